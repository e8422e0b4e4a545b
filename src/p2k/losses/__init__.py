"""Floor 2: functional losses with module twins."""
