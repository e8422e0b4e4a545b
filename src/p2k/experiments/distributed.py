"""One process or many under torchrun, with the same numbers: each global batch is dealt out among the processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p2k.core.errors import P2KError


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Args:
        rank: index of this process, ``0 <= rank < size``.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    def shard(self, batch: Tensor) -> Tensor:
        """This process's share of a global batch along dimension 0; all shares have the same size.

        Raises:
            ValueError: the batch cannot be dealt out evenly.
        """
        if len(batch) % self.size:
            raise ValueError(f"a batch of {len(batch)} does not divide among {self.size} processes: change batch_size")
        return batch[self.rank :: self.size]

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes; a single process gets it back as it is."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def wait(self) -> None:
        """Return once every process got here."""
        if self.size > 1:
            dist.barrier()


def current_world() -> World:
    """The processes that `process_group` joined; a single one outside of it."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, nccl on GPUs and gloo on CPUs; without torchrun, one process.

    Yields:
        This process's place and its own device.

    Raises:
        P2KError: torchrun started more processes on this machine than it has GPUs.
    """
    if "RANK" not in os.environ or not dist.is_available():
        yield World(), device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise P2KError(
                f"process {local} of this machine has no GPU of its own, torch sees {torch.cuda.device_count()}: "
                "lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield current_world(), device
    finally:
        dist.destroy_process_group()
