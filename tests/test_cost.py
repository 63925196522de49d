"""The cost script, on small copies of the published shapes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, strategies
from omegaconf import open_dict
from torch import nn

from alignbench import architecture, assembly, cost
from alignbench.configuration import CONF
from alignbench.policies.saved_pipeline import ARCHITECTURES
from tests.test_architecture import PUBLISHED, configured

SMALL = ["--width", "0.05", "--depth", "0.1", "--resolution", "64", "--device", "cpu", "--repeats", "1"]
FEW = ["--prompts", "2", "--images", "2", "--steps", "3", "--micro-batch", "4"]


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The record of a run of the script."""
    cost.main([*SMALL, *FEW, "--output", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled graphs run as they are: what inductor makes of them is not this script's affair."""
    compiled = []

    def eager(module: nn.Module, **options: object) -> None:
        compiled.append(options)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", dynamic=False)

    monkeypatch.setattr(nn.Module, "compile", eager)
    flags = ["--model", "sd35_medium", "--methods", "srpo", "--dtype", "float32", "--limit", "3"]
    record = run(tmp_path, *flags, "--variants", "plain", "checkpointing", "compile")
    assert [row["variant"] for row in record["rows"]] == ["plain", "checkpointing", "compile"]
    assert len(compiled) == 1
    for row in record["rows"]:
        assert row["images_per_second"] > 0
        assert row["seconds_per_update"] > 0
        assert 0 < row["denoiser_share"] < 1
        assert row["micro_batch"] == 4
        assert row["samples_per_update"] == 2 * 2 * 2  # prompts x images x branches
    assert record["largest_micro_batch"] == {"plain": 3, "checkpointing": 3}
    assert record["environment"]["hardware"]["cpu"]
    assert record["environment"]["packages"]["torch"]
    table = (tmp_path / "sd35_medium_float32.md").read_text()
    assert capsys.readouterr().out == table
    assert table.count("| srpo |") == 3
    assert "checkpointing: 3 (the limit that was tried)" in table


def test_a_model_that_predicts_the_noise_in_bfloat16(tmp_path: Path) -> None:
    record = run(tmp_path, "--model", "sd15")
    assert [row["method"] for row in record["rows"]] == ["sdpo"]
    assert record["options"]["dtype"] == "bfloat16"
    assert record["largest_micro_batch"] == {}


@pytest.mark.parametrize(("model", "methods"), [("flux_dev", cost.METHODS), ("sdxl", ("sdpo",))])
def test_the_methods_that_are_measured_where_none_is_named(
    model: str, methods: tuple[str, ...], tmp_path: Path
) -> None:
    record = run(tmp_path, "--model", model)
    assert [row["method"] for row in record["rows"]] == list(methods)
    for row in record["rows"]:
        assert row["seconds_per_update"] > 0


@pytest.mark.parametrize("model", cost.MODELS)
def test_the_plain_variant_is_plain(model: str) -> None:
    for variant, (checkpointing, compiled) in (
        ("plain", (False, False)), ("checkpointing", (True, False)), ("compile", (False, True)),
    ):  # fmt: skip
        settings = dict(configured(model).model.policy) | cost.VARIANTS[variant]
        assert (settings["gradient_checkpointing"], settings["compile"]) == (checkpointing, compiled)


def test_a_method_that_does_not_fit_into_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cost, "measured", full)
    record = run(tmp_path, "--model", "sd15")
    assert record["rows"] == [{"method": "sdpo", "variant": "plain"}]
    assert "| sdpo | plain | out of memory |" in (tmp_path / "sd15_bfloat16.md").read_text()


@pytest.mark.parametrize("model", cost.MODELS)
def test_narrower_models_are_of_the_same_kind(model: str, tmp_path: Path) -> None:
    """At full size only the text encoders change; at a twentieth the denoiser has less than 3% of the weights."""
    source = ARCHITECTURES / configured(model).model.policy.source
    cost.narrowed(source, tmp_path / "same", 1.0, 1.0)
    for path in source.rglob("*.json"):
        if not path.parent.name.startswith("text_encoder"):
            same = tmp_path / "same" / path.relative_to(source)
            assert json.loads(same.read_text()) == json.loads(path.read_text())
    cost.narrowed(source, tmp_path / "small", 0.05, 0.1)
    config = configured(model, f"model.policy.source={tmp_path / 'small'}", "model.policy.trainable=full")
    with architecture.abstract():
        policy = assembly.abstract_policy(config)
        parameters = sum(each.numel() for each in policy.trainable_parameters().values())
        latents, condition = policy.noise([0]), policy.encode([""])
        assert policy.predict(latents, latents.new_full((1,), 0.5), condition).shape == latents.shape
    assert parameters < 0.03 * PUBLISHED[model]


@pytest.mark.parametrize("method", cost.METHODS)
def test_each_method_takes_a_small_batch(method: str) -> None:
    options = cost.parsed(["--prompts", "2", "--images", "6"])
    checked = assembly.check(cost.configured(options, method, "plain", Path("model")), 1).method
    assert checked.batch.total == 12
    assert checked.expected_cost().rollout > 0


@given(true=strategies.integers(0, 300), limit=strategies.integers(1, 200))
def test_the_search_finds_the_largest_that_fits(true: int, limit: int) -> None:
    tried = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= true

    assert cost.bisected(fits, limit) == min(true, limit)
    assert max(tried) <= limit
    assert len(tried) <= 2 * math.ceil(math.log2(limit + 1)) + 2


def test_running_out_of_memory_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples fit; another error is one."""
    cost.narrowed(ARCHITECTURES / configured("sd15").model.policy.source, tmp_path, 0.05, 0.1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["model=sd15", f"model.policy.source={tmp_path}", "model.policy.resolution=64"])
    with open_dict(config):
        config.model.policy.weights = "random"
    policy = assembly.pretrained(config, assembly.launched(config))
    predict = type(policy).predict

    def limited(self: Any, latents: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(latents) > 5:
            raise torch.OutOfMemoryError("out of memory")
        output: torch.Tensor = predict(self, latents, *arguments, **options)
        return output

    monkeypatch.setattr(type(policy), "predict", limited)
    assert cost.largest_micro_batch(policy, 100) == 5
    assert all(parameter.grad is None for parameter in policy.trainable_parameters().values())

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("another error")

    monkeypatch.setattr(type(policy), "predict", broken)
    with pytest.raises(RuntimeError, match="another error"):
        cost.largest_micro_batch(policy, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "2"], "--width 2: above 0, at most 1"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--limit", "-1"], "--limit -1: 0 or more"),
    ],
)
def test_impossible_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cost.main(arguments)
    assert message in capsys.readouterr().err


def test_a_method_that_does_not_fit_is_told_before_any_work(tmp_path: Path) -> None:
    from alignbench.errors import ConfigError

    with pytest.raises(ConfigError, match="flow_grpo holds for models that predict velocity"):
        run(tmp_path, "--model", "sd15", "--methods", "sdpo", "flow_grpo")
    assert not list(tmp_path.iterdir())
