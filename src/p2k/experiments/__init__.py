"""Floor 4: training, statistics and frozen result records."""
