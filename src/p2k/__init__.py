"""From Paper to Kernel: papers as layers, losses, optimizers and kernels, each checked against float64."""

__version__ = "0.1.0"
