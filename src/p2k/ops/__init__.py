"""Floor 1: functions with a fused kernel, one folder per op."""
