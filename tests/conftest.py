"""Settings every test process needs before torch and Triton are imported."""

import os

# One thread is deterministic, and faster when test processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SOURCE_DATE_EPOCH"] = "0"

import torch

# Triton fixes interpreter mode at its first import in a process. Compile-only checks run in processes without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
