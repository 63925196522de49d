"""Optional mirrors of a run's records. The plain files come first; a tracker only shows them elsewhere."""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from alignbench.errors import ConfigError
from alignbench.records import read_run


class Tracker(ABC):
    """Shows numbers and sample grids somewhere else."""

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show named numbers at an iteration."""

    @abstractmethod
    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG at an iteration."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is pending."""


def numbers_of(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The plain numbers of a record's row, named ``prefix/key``."""
    return {f"{prefix}/{key}": float(value) for key, value in row.items() if isinstance(value, int | float)}


class TensorBoard(Tracker):
    """Events in ``<run>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tracker=tensorboard needs the extra: pip install 'alignbench[tracking]'") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._writer.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, with its files in ``<run>/wandb``.

    A run that is continued stays the same one there, because its id follows from the folder; what is shown again after
    an interruption lies on the iterations that it belongs to.

    Args:
        folder: of the run; its last parts are the name.
        project, entity: where it is shown; None for the user's own entity.
        mode: ``offline`` writes files alone, for ``wandb sync``; ``online`` uploads them.

    Raises:
        ConfigError: the package is missing, or the service refuses.
    """

    def __init__(self, folder: Path, *, project: str, entity: str | None, mode: Literal["offline", "online"]) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError("tracker=wandb needs the extra: pip install 'alignbench[tracking]'") from error
        recorded = read_run(folder)
        try:
            self._run: Any = self._wandb.init(
                project=project,
                entity=entity,
                mode=mode,
                dir=str(folder),
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                name="/".join(folder.parts[-3:]),
                group=str(recorded.run.get("experiment", "")),
                config=recorded.config,
                resume="allow",
            )
        except self._wandb.Error as error:
            raise ConfigError(
                f"tracker=wandb cannot start ({error}); tracker.mode=offline needs no account and no network"
            ) from error
        self._run.define_metric("*", step_metric="iteration")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"iteration": step, **numbers})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"iteration": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()
