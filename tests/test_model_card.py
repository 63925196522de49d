"""The model card says what was trained and what the records hold."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from alignbench.model_card import card, curve, write
from alignbench.records import Run, read_run
from alignbench.run import run
from tests.conftest import Compose


def test_the_exported_folder_has_a_card_with_the_recorded_numbers(
    tiny_run: Compose, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tiny_run())
    text = (folder / "lora" / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "reinforcement-learning", "alignbench", "diffusion_nft"],
    }
    assert "license:" in header
    recorded = json.loads((folder / "run.json").read_text())
    for expected in (recorded["final_protocol_hash"], recorded["config_hash"], "| reward | red |", "| seed | 0 |"):
        assert expected in body
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    shown = [row for row in rows if row["protocol"] == "final"]
    assert len(shown) == 4
    for row in shown:
        value, error, drift = row["metrics"]["reward"], row["standard_errors"]["reward"], row["metrics"]["drift"]
        weights = {"base": "base model", "evaluation": "these"}[row["weights"]]
        assert f"| {weights} | {row['guidance']:g} | {value:.4f} ± {error:.4f} | {drift:.4f} |" in body
    assert str(tiny_checkpoint.parent) not in text  # no path of this machine
    assert "![red on held-out prompts over the budget](curve.png)" in body
    with Image.open(folder / "lora" / "curve.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 16)) > 2  # type: ignore[arg-type]
    method = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert method == yaml.safe_load((folder / "config.yaml").read_text())["method"]

    code = body.split("```python\n")[1].split("```")[0]  # what it tells to do works
    shutil.copytree(tiny_checkpoint, tmp_path / "here" / tiny_checkpoint.name)
    shutil.copytree(folder / "lora", tmp_path / "here" / "path" / "to" / "this" / "folder")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["image"].size == (16, 16)  # type: ignore[attr-defined]


def test_the_curve_is_of_the_records_and_left_out_where_it_cannot_be_drawn(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = read_run(run(tiny_run()))
    rows = [
        row | {"metrics": {"reward": 2.0 if row["fraction"] > 0.9 else 0.0}, "standard_errors": {}}
        for row in trained.evaluations
    ]

    def with_evaluations(evaluations: list[dict[str, object]]) -> Run:
        return replace(trained, evaluations=evaluations)

    assert curve(with_evaluations(rows)) != curve(trained)
    assert curve(with_evaluations([])) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # the extra is not installed
    assert curve(trained) is None
    write(trained, tmp_path)
    assert "curve.png" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "curve.png").exists()


def test_a_base_model_of_the_hub_is_linked_and_an_embedded_one_is_found() -> None:
    described = {"method": "awm", "reward": "geneval", "seed": 3, "config_hash": "abc", "variant": "beta=1"}
    described |= {"git": {"commit": None, "dirty": None}}

    def with_policy(scales: Sequence[float] = (1.0, 4.5), **policy: object) -> str:
        config = {"model": {"name": "m", "domain": "photo", "policy": policy}, "method": {"name": "awm"}}
        protocol = {"steps": 40, "guidance": list(scales)}
        return card(Run(Path(), described | {"final_protocol": protocol}, config, {}, [], [], ()))

    hub = with_policy(source="owner/a-model", trainable="full", resolution=512)
    header = yaml.safe_load(hub.split("---\n")[1])
    assert (header["base_model"], "lora" in header["tags"]) == ("owner/a-model", False)
    assert "| method | awm@beta=1 |" in hub
    assert "| reward | geneval (detector: geneval-hf) |" in hub
    assert 'DiffusionPipeline.from_pretrained("owner/a-model")' in hub
    assert "AutoModel.from_pretrained" in hub
    assert "num_inference_steps=40, guidance_scale=1, height=512, width=512)" in hub
    flux = {"source": "owner/flux", "trainable": "lora", "guidance_embedding": 3.5, "max_sequence_length": 128}
    assert 'pipe("a prompt", num_inference_steps=40, guidance_scale=3.5, max_sequence_length=128)' in with_policy(
        **flux
    )
    guided = with_policy(scales=[2.0], **flux)
    assert 'guidance_scale=3.5, true_cfg_scale=2, negative_prompt="", max_sequence_length=128)' in guided
    unet = with_policy(source="o/sd15", trainable="lora", _target_="alignbench.policies.unet.StableDiffusionPolicy")
    assert "from diffusers import DDIMScheduler, DiffusionPipeline\n" in unet
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False" in unet
    embedded = with_policy(source="embedded:generator", trainable="lora", max_sequence_length=0)
    assert "base_model" not in yaml.safe_load(embedded.split("---\n")[1])
    assert 'from_pretrained(embedded("embedded:generator"), text_encoder_3=None, tokenizer_3=None)' in embedded
    assert "## Scores" not in embedded  # none were recorded
