import torch

# A test without the device it needs is not collected, rather than reported as skipped.
collect_ignore = [] if torch.cuda.is_available() else ["test_oqc_gpu.py"]
