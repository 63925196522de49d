"""The loop end to end on a tiny checkpoint."""

import json
import resource
from pathlib import Path

import pytest
from omegaconf import open_dict
from safetensors import SafetensorError

from alignbench.errors import ConfigError, RecordError
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.run import run
from tests.conftest import Compose


@pytest.mark.parametrize("method", ["diffusion_nft", "flow_grpo"])
def test_a_run_leaves_complete_records(tiny_run: Compose, method: str) -> None:
    folder = run(tiny_run(f"method={method}"))

    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["protocol"], row["weights"], row["guidance"]) for row in evaluations] == [
        ("curve", "base", 1.0),
        ("final", "base", 1.0),
        ("final", "base", 3.0),
        ("curve", "evaluation", 1.0),
        ("curve", "evaluation", 1.0),
        ("final", "evaluation", 1.0),
        ("final", "evaluation", 3.0),
        ("curve", "current", 1.0),
    ]
    assert evaluations[0]["metrics"]["drift"] == 0
    assert evaluations[-1]["metrics"]["drift"] > 0
    assert Path(folder / "lora" / "pytorch_lora_weights.safetensors").stat().st_size > 1000


def test_the_base_is_evaluated_once_for_runs_that_would_repeat_it(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignbench.assembly._git", lambda: {"commit": "abc", "dirty": False})
    folders = [run(tiny_run(f"method={method}")) for method in ("diffusion_nft", "flow_grpo")]
    first, second = (
        [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()] for folder in folders
    )
    for ours, theirs in zip(second[:3], first[:3], strict=True):
        assert ours["volatile"]["reused_from"] == "red/diffusion_nft/seed0"
        assert [ours[key] for key in ("metrics", "cost", "guidance")] == [
            theirs[key] for key in ("metrics", "cost", "guidance")
        ]
        assert ours["ledger"]["phases"]["evaluation"] == theirs["ledger"]["phases"]["evaluation"]
        assert (folders[1] / ours["grid"]).read_bytes() == (folders[0] / theirs["grid"]).read_bytes()
    assert second[3]["volatile"]["reused_from"] is None

    (folders[0] / first[0]["scores"]).unlink()  # records are shared without some of their files
    (folders[1] / second[0]["grid"]).unlink()
    third = run(tiny_run("method=flow_grpo", "seed=1"))
    assert json.loads((third / "evaluations.jsonl").read_text().splitlines()[0])["volatile"]["reused_from"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no peak that can be reset")
def test_the_recorded_peak_of_memory_is_the_run_s_own(tiny_run: Compose) -> None:
    large = b"x" * 2**30
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    del large  # a run before this one in the same sweep was larger
    folder = run(tiny_run())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert 100 < json.loads(line)["volatile"]["memory_mb"] < before - 512


def test_tensorboard_shows_the_rows_and_the_grids(tiny_run: Compose) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(tiny_run("tracker=tensorboard"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("train/reward")]
    assert shown == [(row["iteration"], pytest.approx(row["reward"])) for row in rows]
    assert len(events.Images("curve/evaluation_g1")) == 2


class Unavailable:
    """A tracker whose service cannot be reached."""

    def __init__(self, folder: Path) -> None:
        raise ConfigError(f"no service for {folder.name}")


def test_a_tracker_that_cannot_be_built_stands_in_the_records(tiny_run: Compose) -> None:
    config = tiny_run()
    with open_dict(config):
        config.tracker = {"_target_": f"{__name__}.Unavailable"}
    with pytest.raises(ConfigError, match="no service for seed0"):
        run(config)
    (status,) = Path(config.results).rglob("status.json")
    assert json.loads(status.read_text())["message"] == "no service for seed0"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"cannot write .*lora: the disk is full; files written before are in"),
        (SafetensorError("I/O error: No space left on device"), r"cannot write .*lora: I/O error: No space left"),
    ],
)
def test_weights_are_exported_wholly_or_not_at_all(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    config = tiny_run()
    export = StableDiffusion3Policy.export

    def torn(self: StableDiffusion3Policy, folder: Path, view: str = "evaluation") -> None:
        export(self, folder, view)
        (weights,) = Path(folder).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:100])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion3Policy, "export", torn)
        with pytest.raises(RecordError, match=message):
            run(config)
    (folder,) = (path.parent for path in Path(config.results).rglob("status.json"))
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert not (folder / "lora").exists()
    before = (folder / "evaluations.jsonl").read_text()
    run(config)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").stat().st_size > 1000
    assert (folder / "evaluations.jsonl").read_text() == before  # nothing was evaluated again
