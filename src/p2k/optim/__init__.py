"""Floor 2: optimizers."""
