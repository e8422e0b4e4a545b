import pytest
import torch

from p2k.core.interpreter import quick_calls

GPU = torch.cuda.is_available()
# A test without the device it needs is not collected, rather than reported as skipped.
collect_ignore_glob = ["test_*_interpreter.py"] if GPU else ["test_*_gpu.py"]


@pytest.fixture(autouse=True)
def _gpu_where_there_is_one():
    """The same tests run compiled kernels on a GPU and, quickly, interpreted ones elsewhere."""
    with torch.device("cuda") if GPU else quick_calls():
        yield
