"""What autocast does to the operands of a linear layer, for functions that stand in for one."""

import torch
from torch import Tensor


def as_linear_operand(tensor: Tensor | None) -> Tensor | None:
    """What `torch.nn.functional.linear` makes of a float32 operand under autocast; anything else as it is."""
    if tensor is None or tensor.dtype != torch.float32:
        return tensor
    kind = tensor.device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return tensor.to(torch.get_autocast_dtype(kind)) if active else tensor
