"""Settings beside the released configurations: the page says what conf/ says, and no difference is without a reason."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def script() -> ModuleType:
    """``experiments/released_code/settings.py``, which is no part of the package."""
    path = ROOT / "experiments" / "released_code" / "settings.py"
    spec = importlib.util.spec_from_file_location("released_settings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["released_settings"] = module
    spec.loader.exec_module(module)
    return module


SCRIPT = script()
RELEASED: dict[str, dict[str, Any]] = SCRIPT.read()


@pytest.mark.parametrize("name", RELEASED)
def test_ours_is_the_released_value_or_says_why_not(name: str) -> None:
    for setting, ours, told in SCRIPT.rows(RELEASED[name]):
        assert (ours != told["released"]) == ("why" in told), f"{setting}: ours {ours}, released {told['released']}"


def test_the_page_is_written_from_the_configurations() -> None:
    written = SCRIPT.PAGE.read_text(encoding="utf-8")
    assert written == SCRIPT.page(RELEASED), "run python experiments/released_code/settings.py"


def test_every_method_with_a_released_configuration_is_there() -> None:
    composed = {entry["compose"][0].removeprefix("method=") for entry in RELEASED.values()}
    listed = {"diffusion_nft", "flow_grpo", "flow_grpo_fast", "tempflow_grpo", "dance_grpo", "mix_grpo", "awm"}
    listed |= {"experiment=srpo_hpsv2_flux", "sdpo", "dpo_sdpo", "dspo_sdpo"}
    assert composed == listed
