"""Optional mirrors of a run's records. The plain files come first; a tracker only shows them elsewhere."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignbench.errors import ConfigError


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
