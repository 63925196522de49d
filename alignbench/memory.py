"""Memory that ran out, whoever says so."""

import torch

from alignbench.errors import RewardMemoryError


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the machine's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | RewardMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
