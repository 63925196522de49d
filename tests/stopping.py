"""A run that is stopped as by Ctrl-C."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from alignbench.records import RunDirectory
from alignbench.run import run


def stopped(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after its first iteration."""
    append = RunDirectory.append_metrics

    def interrupting(self: RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_metrics", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    return next(Path(config.results).rglob("status.json")).parent
