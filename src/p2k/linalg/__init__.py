"""Floor 1: plain torch mathematics that several methods share."""
