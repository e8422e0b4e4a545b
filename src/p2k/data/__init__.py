"""Floor 3: generators first, checksummed downloads second."""
