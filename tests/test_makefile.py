"""make install: an environment that was left half made is ours to make again; somebody's own is kept."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Stands for the Python that makes an environment, whose own Python notes what it is asked to install.
PYTHON = """#!/bin/sh
if [ "$1 $2" != "-m venv" ]; then exit 0; fi
mkdir -p "$3/bin"
printf '#!/bin/sh\\n[ "$3" = --version ] || echo "$@" >>"%s/asked"\\nexit '"$BROKEN"'\\n' "$3" >"$3/bin/python"
chmod +x "$3/bin/python"
exit "$BROKEN"
"""


@pytest.fixture
def install(tmp_path: Path) -> tuple[Path, list[str]]:
    """An environment's folder and the command that makes it."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    python, environment = tmp_path / "python", tmp_path / "environment"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return environment, ["make", "install", f"VENV={environment}", f"PYTHON={python}", "GIGABYTES=0"]


def made(command: list[str], broken: int) -> int:
    environment = os.environ | {"BROKEN": str(broken)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


def test_a_half_made_environment_is_made_again(install: tuple[Path, list[str]]) -> None:
    environment, command = install
    assert made(command, broken=1) != 0
    assert os.access(environment / "bin" / "python", os.X_OK)
    assert not (environment / "asked").exists()
    assert made(command, broken=0) == 0
    assert "-c constraints.txt" in (environment / "asked").read_text()


def test_an_environment_of_ones_own_keeps_its_versions(install: tuple[Path, list[str]]) -> None:
    environment, command = install
    subprocess.run([command[3].removeprefix("PYTHON="), "-m", "venv", environment], env={"BROKEN": "0", **os.environ})
    assert made(command, broken=1) == 0
    assert "constraints.txt" not in (environment / "asked").read_text()
