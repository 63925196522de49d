"""One run on one or several processes.

No wrapper around the model: samples are sharded, scores gathered, gradients summed once per optimizer step. Nothing
inside a loss communicates, so uneven shards and several forward passes per step are harmless.

Whatever processes tell each other goes through one exchange, in which one that has failed says so instead: the others
then fail with its message, wherever they are, and nobody waits for somebody who is gone.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

import torch
import torch.distributed as distributed
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from alignbench.errors import AlignbenchError, ProcessError

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """All processes have agreed to stop, at a point from which the run can continue."""


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

    def rounds(self, n: int, size: int) -> list[range]:
        """Places within ``shard(n)`` in blocks of at most ``size``: as many on every process, the last may be empty."""
        own, largest = len(self.shard(n)), -(-n // self.count)
        return [range(min(own, start), min(own, start + size)) for start in range(0, largest, size)]

    def gather(self, local: Tensor) -> Tensor:
        """Concatenate the (possibly uneven) first axes of all processes, in rank order, on every process."""
        if self.count == 1:
            return local
        return torch.cat([part.to(local.device) for part in self._exchange(local.detach().cpu())])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over all processes, in place, in one all-reduce."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._exchange(None)
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def join(self, values: dict[str, float], join: Callable[[Sequence[float]], float]) -> dict[str, float]:
        """Join named numbers over all processes, by ``sum`` or ``max``; a name may be absent on some."""
        if self.count == 1:
            return values
        parts = self._exchange(values)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: join([part[name] for part in parts if name in part]) for name in names}

    def share(self, value: T) -> T:
        """The main process's value, on every process."""
        return cast(T, self._exchange(value if self.main else None)[0])

    def any(self, value: bool) -> bool:
        """Whether it is true on one of the processes; the same answer on every process."""
        return any(self._exchange(value))

    def _exchange(self, value: T, failure: str | None = None) -> list[T]:
        """Every process's value, in rank order, on every process.

        Raises:
            ProcessError: a process has failed and will exchange nothing more.
        """
        if self.count == 1:
            return [value]
        try:
            parts: list[tuple[str | None, T]] = gather_object([(failure, value)])
        except RuntimeError as error:
            raise ProcessError(
                "another process of this run has ended without a word (killed, or out of memory); the same command "
                "continues from the last checkpoint"
            ) from error
        failures: dict[str, int] = {}
        for rank, (text, _) in enumerate(parts):
            if text is not None:
                failures.setdefault(text, rank)
        if failures:
            named = [f"process {rank}: {text}" if rank else text for text, rank in failures.items()]
            raise ProcessError("; ".join(named))
        return [part[1] for part in parts]

    @contextmanager
    def together(self) -> Iterator[None]:
        """End together: when one process fails, all do, and the main process prints the message, once.

        With several processes an exception leaves as the cause of a ``SystemExit``; one that is no ``AlignbenchError``
        has its traceback printed where it happened. With one process it goes on as it is.
        """
        if self.count == 1:
            yield
            return
        stopped = None
        try:
            try:
                yield
            except Stopped as stop:
                stopped = stop
            self._exchange(None)  # nobody leaves while another one may still fail
        except Exception as error:
            if not isinstance(error, AlignbenchError):
                traceback.print_exception(error)
            told = error if isinstance(error, ProcessError) else self._fail(error)
            if self.main:
                print(f"alignbench: {told}", file=sys.stderr, flush=True)
            with suppress(ProcessError):
                self._exchange(None)  # a launcher ends the others as soon as one has left
            raise SystemExit(1) from error
        if stopped is not None:
            raise stopped

    def _fail(self, error: Exception) -> ProcessError:
        """Tell the others, whatever they are about to exchange."""
        text = str(error) if isinstance(error, AlignbenchError) else f"{type(error).__name__}: {error}"
        try:
            self._exchange(None, failure=text)
        except ProcessError as told:
            return told
        raise AssertionError("an exchange that has a failure raises")
