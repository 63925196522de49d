import os

import pytest

from alignbench import records


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync matters when the power fails, which no test here does; it still checks its descriptor."""
    monkeypatch.setattr(records, "_fsync", os.fstat)
