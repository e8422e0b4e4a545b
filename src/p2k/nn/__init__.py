"""Floor 2: layers."""
