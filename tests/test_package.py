"""The installed package: complete outside the checkout, and quick to answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "scipy", "pandas", "matplotlib")
LOADED_AT_EXIT = f"""
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr))
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, installed without its dependencies into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("alignbench-*.whl")
    target = folder / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True)
    return target


def outside(installed: Path, folder: Path, *arguments: str) -> str:
    """What a command prints in a folder outside the checkout, with the installed package alone on the path."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_configurations_checkpoints_templates_and_licence(installed: Path) -> None:
    package = installed / "alignbench"
    for kind, source in (("conf", ROOT / "conf"), ("shapes/checkpoints", ROOT / "alignbench/shapes/checkpoints")):
        shipped = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        assert shipped
        assert shipped <= {path.relative_to(package / kind) for path in (package / kind).rglob("*")}
    assert any((package / "report" / "templates").glob("*.jinja"))
    assert any(installed.glob("alignbench-*.dist-info/licenses/LICENSE"))
    assert not any(path.name == "tests" for path in installed.iterdir())


def test_the_wheel_runs_from_its_own_folder(installed: Path, tmp_path: Path) -> None:
    found = outside(installed, tmp_path, "-c", "import alignbench.configuration as it; print(it.PACKAGE, it.CONF)")
    assert found.split() == [str(installed / "alignbench"), str(installed / "alignbench" / "conf")]


def test_the_wheel_composes_a_configuration(installed: Path, tmp_path: Path) -> None:
    printed = outside(installed, tmp_path, "-m", "alignbench", "method=flow_grpo", "--cfg", "job")
    assert "_target_: alignbench.methods.flow_grpo.FlowGRPO" in printed
    assert "== Configuration groups ==" in outside(installed, tmp_path, "-m", "alignbench", "--help")
    assert not any(tmp_path.iterdir())  # looking leaves nothing behind


def test_the_wheel_finds_its_checkpoints(installed: Path, tmp_path: Path) -> None:
    plan = outside(installed, tmp_path, "-m", "alignbench", "dry_run=true", "device=cpu")
    assert "12 prompts x 8 images = 96" in plan
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["alignbench", "--help"], set()),
        (["alignbench", "--cfg", "job"], set()),
        (["alignbench.report", "--help"], {"scipy", "pandas", "matplotlib"}),
    ],
    ids=["help", "configuration", "report"],
)
def test_looking_imports_nothing_heavy(arguments: list[str], allowed: set[str]) -> None:
    command = [sys.executable, "-c", LOADED_AT_EXIT, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (loaded,) = [line for line in done.stderr.splitlines() if line.startswith("loaded:")]
    assert set(loaded.split()[1:]) <= allowed
