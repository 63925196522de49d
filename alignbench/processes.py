"""One run on one or several processes.

No wrapper around the model: samples are sharded, scores gathered, gradients summed once per optimizer step. Nothing
inside a loss communicates, so uneven shards and several forward passes per step are harmless.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

T = TypeVar("T")


class Processes:
    """The processes of a run; with one process every operation is the identity.

    Args:
        device: ``"cpu"`` or ``"cuda"``; with ``"cuda"`` each process takes the GPU of its local rank.
    """

    def __init__(self, device: str = "cpu") -> None:
        state = PartialState(cpu=device == "cpu")
        self.device: torch.device = state.device
        self.rank: int = state.process_index
        self.count: int = state.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes records."""
        return self.rank == 0

    def shard(self, n: int) -> range:
        """The contiguous block of ``range(n)`` that belongs to this process; sizes differ by at most one."""
        return range(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def gather(self, local: Tensor) -> Tensor:
        """Concatenate the (possibly uneven) first axes of all processes, in rank order, on every process."""
        if self.count == 1:
            return local
        return torch.cat([part.to(local.device) for part in gather_object([local.detach().cpu()])])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all processes, in place, in one all-reduce."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def join(self, values: dict[str, float], join: Callable[[Sequence[float]], float]) -> dict[str, float]:
        """Join named numbers over all processes, by ``sum`` or ``max``; a name may be absent on some."""
        if self.count == 1:
            return values
        parts = gather_object([values])
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: join([part[name] for part in parts if name in part]) for name in names}

    def share(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        return cast(T, broadcast_object_list([value])[0])
