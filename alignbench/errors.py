"""Errors that a user can act on: each says what was expected, what came, and what would work."""

from pathlib import Path


class AlignbenchError(Exception):
    """Base class: the command line prints these as one message, without a traceback."""


class ConfigError(AlignbenchError):
    """The configuration cannot be run as it stands."""


class DataError(AlignbenchError):
    """A prompt file or data set is missing or malformed."""


class CheckpointError(AlignbenchError):
    """Weights are missing, truncated or of another shape."""


class RewardError(AlignbenchError):
    """A reward fails, returns what is no reward, is not finite, or does not vary at all."""


class RewardMemoryError(RewardError):
    """Memory ran out inside a reward: it is asked for fewer images at once before this ends a run."""


class RecordError(AlignbenchError):
    """A run directory cannot be written or does not belong to this configuration."""


class LockedError(RecordError):
    """Another process is writing the run directory ``folder``; ``writer`` says which."""

    def __init__(self, folder: Path, writer: str) -> None:
        super().__init__(f"{folder} is being written by {writer}: wait for it, end it, or choose another folder.")
        self.folder, self.writer = folder, writer


class BudgetError(AlignbenchError):
    """A budget is missing, negative or too small for one iteration."""


class ProcessError(AlignbenchError):
    """A process of the run has failed: its message, on every process."""
