"""Scoring what was made elsewhere: the same numbers as a run records, the same report, clear refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from PIL import Image
from safetensors.torch import save_file

from alignbench import assembly
from alignbench.errors import AlignbenchError, CheckpointError, ConfigError, DataError, RecordError
from alignbench.evaluate import evaluate
from alignbench.policies.flux import pack
from alignbench.report.data import load
from alignbench.report.page import build
from alignbench.run import run
from alignbench.seeding import seed_of
from tests.conftest import CONF, Compose
from tests.tiny import tiny_sd3

SHARED = ("model", "reward", "prompts", "evaluation", "name", "results", "device", "micro_batch", "threads")


@pytest.fixture
def evaluating(tiny_run: Compose) -> Compose:
    """Composes an evaluation with the model, reward, prompts and protocols of ``tiny_run``."""

    def composed(*overrides: str, run_overrides: tuple[str, ...] = ()) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("evaluate", list(overrides))
        trained = tiny_run(*run_overrides)
        with open_dict(config):
            for key in SHARED:
                config[key] = trained[key]
        return config

    return composed


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def final_rows(folder: Path) -> dict[tuple[str, float], dict[str, Any]]:
    return {(row["weights"], row["guidance"]): row for row in rows_of(folder) if row["protocol"] == "final"}


def test_an_exported_lora_and_its_base_get_the_numbers_that_the_run_recorded(
    tiny_run: Compose, evaluating: Compose, tmp_path: Path
) -> None:
    trained = run(tiny_run("method.optimizer.lr=0.01"))
    scored = evaluate(evaluating(f"lora={trained / 'lora'}", "label=ours"))
    expected, found = final_rows(trained), final_rows(scored)
    assert list(found) == [("base", 1.0), ("base", 3.0), ("evaluation", 1.0), ("evaluation", 3.0)]
    for key, row in found.items():
        for part in ("metrics", "standard_errors", "protocol_hash", "prompts", "images"):
            assert row[part] == expected[key][part], (key, part)
        assert json.loads((scored / row["scores"]).read_text()) == json.loads(
            (trained / expected[key]["scores"]).read_text()
        )
        assert (scored / row["grid"]).read_bytes() == (trained / expected[key]["grid"]).read_bytes()
    assert found["evaluation", 1.0]["metrics"]["drift"] > 0
    assert found["evaluation", 1.0]["metrics"]["reward"] != found["base", 1.0]["metrics"]["reward"]

    (study,) = load([tmp_path / "results"]).studies
    assert study.comparisons[0].labels == ["diffusion_nft", "ours"]
    page = build([tmp_path / "results"], tmp_path / "report", say=lambda line: None)
    assert page.stat().st_size > 10_000
    (table,) = (tmp_path / "report" / "tables").glob("headline*.csv")
    lines = table.read_text().splitlines()
    value = {tuple(line.split(",")[3:5]): line.split(",")[9] for line in lines[1:] if line.split(",")[7] == "reward"}
    assert value["ours", "1.0"] == value["diffusion_nft", "1.0"]
    assert value["base", "1.0"] != value["ours", "1.0"]
    (cost,) = (tmp_path / "report" / "tables").glob("cost*.csv")
    ours = next(line for line in cost.read_text().splitlines() if ",ours," in line)
    assert ours.split(",")[5:12] == [""] * 7  # what training it cost is not known: no zeros


def test_the_base_alone_is_a_base_row(tiny_run: Compose, evaluating: Compose, tmp_path: Path) -> None:
    scored = evaluate(evaluating("protocol=curve"))
    trained = run(tiny_run())
    (row,) = rows_of(scored)
    assert (row["weights"], row["protocol"]) == ("base", "curve")
    assert row["metrics"] == rows_of(trained)[0]["metrics"]
    shutil.rmtree(trained)
    build([tmp_path / "results"], tmp_path / "report", say=lambda line: None)
    (table,) = (tmp_path / "report" / "tables").glob("headline*.md")
    assert "none finished" not in table.read_text()


def test_a_finished_evaluation_is_skipped_and_an_unfinished_one_makes_what_is_missing(
    evaluating: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(evaluating())
    before = rows_of(whole)
    evaluate(evaluating())
    assert "already done, skipped" in capsys.readouterr().out
    assert rows_of(whole) == before

    lines = (whole / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (whole / "evaluations.jsonl").write_text(lines[0] + lines[1][:50])  # killed within the second row
    (whole / "status.json").write_text('{"status": "running"}')
    evaluate(evaluating())
    assert [row["metrics"] for row in rows_of(whole)] == [row["metrics"] for row in before]
    assert [row["cost"] for row in rows_of(whole)] == [row["cost"] for row in before]  # texts are read once
    assert rows_of(whole)[0] == before[0]  # kept, not made again
    assert rows_of(whole)[1]["volatile"] != before[1]["volatile"]


def test_a_row_that_no_evaluation_wrote_is_named(evaluating: Compose) -> None:
    whole = evaluate(evaluating())
    rows = rows_of(whole)
    del rows[1]["cost"]
    (whole / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (whole / "status.json").unlink()
    with pytest.raises(RecordError, match=r"evaluations\.jsonl, row 2: cost is None.*delete that line"):
        evaluate(evaluating())
    (whole / "evaluations.jsonl").write_text(json.dumps(rows[0]) + "\n")
    evaluate(evaluating())
    assert json.loads((whole / "status.json").read_text())["status"] == "done"


def test_pictures_are_not_saved_through_a_link(evaluating: Compose, tmp_path: Path) -> None:
    config = evaluating("save_images=true", "protocol=curve")
    folder = evaluate(config)
    (picture, *_) = sorted((folder / "samples").rglob("*.png"))
    saved = picture.read_bytes()
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"my picture")
    picture.unlink()
    picture.symlink_to(mine)
    (folder / "evaluations.jsonl").unlink()
    (folder / "status.json").unlink()
    evaluate(config)
    assert mine.read_bytes() == b"my picture"
    assert (picture.is_symlink(), picture.read_bytes()) == (False, saved)


def test_other_base_weights_are_not_mixed_into_an_evaluation(
    evaluating: Compose, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = evaluating(run_overrides=(f"model.policy.source={tmp_path / 'model'}",))
    evaluate(config)
    (weights,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RecordError, match=r"begun with other inputs .*\n  model\.policy\.source"):
        evaluate(config)


def test_records_of_something_else_are_not_overwritten(evaluating: Compose, tmp_path: Path) -> None:
    lora, layer = tmp_path / "lora.safetensors", "transformer.transformer_blocks.0.attn.to_q"
    for scale in (1.0, 2.0):
        weights = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": scale * torch.ones(16, 2)}
        save_file(weights, lora)
        if scale == 1.0:
            scored = evaluate(evaluating(f"lora={lora}", "label=theirs"))
    before = rows_of(scored)
    with pytest.raises(RecordError, match=r"holds a run of another configuration[\s\S]*method.sha256"):
        evaluate(evaluating(f"lora={lora}", "label=theirs"))
    assert rows_of(scored) == before


def test_loras_of_others_make_the_images_that_diffusers_makes(
    tiny_run: Compose, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Ranks and alphas that differ by layer; written by PEFT, read by diffusers and here."""
    from peft import LoraConfig, get_peft_model_state_dict

    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["attn.to_q", "attn.to_out.0", "ff.net.2"],
        rank_pattern={"attn.to_q": 2},
        alpha_pattern={"transformer_blocks.1.ff.net.2": 9},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_checkpoint, text_encoder_3=None, tokenizer_3=None)
    pipeline.transformer.add_adapter(config)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    parts = tiny_run()
    lora = assembly.lora(parts, str(tmp_path / "theirs"))
    assert lora.rank == 3
    policy = assembly.pretrained(parts, assembly.launched(parts), **lora.settings())
    lora.install(policy, "evaluation")
    noise, t = policy.noise([1, 2]), torch.tensor([0.7, 0.3])
    condition = policy.encode(["ab", "cd"])
    with torch.no_grad():
        ours = policy.predict(noise, t, condition, view="evaluation")
        base = policy.predict(noise, t, condition, view="reference")
        theirs = pipeline.transformer(
            hidden_states=noise,
            timestep=1000 * t,
            encoder_hidden_states=condition.tensors["prompt"],
            pooled_projections=condition.tensors["pooled"],
        ).sample
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, base, atol=1e-2)


def lora_of_diffusers(model: str, checkpoint: Path, folder: Path) -> None:
    """A LoRA that PEFT made and the pipeline saved: it changes queries and values by a scale of 5 / 3."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    part = "transformer" if model == "flux_dev" else "unet"
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    getattr(pipe, part).add_adapter(config)
    layers = get_peft_model_state_dict(getattr(pipe, part))
    saved = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(folder, **saved)


def lora_of_a_run(policy: Any, folder: Path) -> None:
    """What a run exports, with weights that make a difference."""
    policy.add_view("evaluation")
    for name, tensor in policy.weights.tensors("evaluation").items():
        if name.endswith("lora_B"):
            tensor.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    policy.export(folder)


@pytest.mark.parametrize("origin", ["diffusers", "a run"])
@pytest.mark.parametrize("model", ["flux_dev", "sdxl", "sd15"])
def test_a_lora_of_every_family_gets_the_score_of_the_images_that_its_pipeline_makes(
    evaluating: Compose, checkpoints: dict[str, Path], tmp_path: Path, model: str, origin: str
) -> None:
    flux = model == "flux_dev"
    overrides = (
        *(f"model={model}", f"model.policy.source={checkpoints[model]}", "model.policy.resolution=16"),
        *("model.policy.dtype=float32", "evaluation.final.guidance=[1.0]"),
        *(("model.policy.max_sequence_length=12",) if flux else ()),
    )
    config = evaluating(f"lora={tmp_path / 'lora'}", "label=theirs", run_overrides=overrides)
    with open_dict(config):
        config.reward.parts.red.photo = config.reward.parts.red.shapes
    policy: Any = assembly.pretrained(config, assembly.launched(config))
    if origin == "diffusers":
        lora_of_diffusers(model, checkpoints[model], tmp_path / "lora")
    else:
        lora_of_a_run(policy, tmp_path / "lora")
    rows = final_rows(evaluate(config))

    pipe = DiffusionPipeline.from_pretrained(checkpoints[model])
    pipe.set_progress_bar_config(disable=True)
    texts = [(f"prompts/{number:05d}", text) for number, text in enumerate(("ab", "cd", "ef", "gh")) for _ in range(2)]
    noise = policy.noise([seed_of("evaluation noise", key, row % 2) for row, (key, _) in enumerate(texts)])
    more = {"guidance_scale": 3.5, "max_sequence_length": 12} if flux else {"guidance_scale": 1.0}
    for weights in ("base", "evaluation"):
        if weights == "evaluation":
            pipe.load_lora_weights(tmp_path / "lora")
        images = pipe(
            [text for _, text in texts],
            latents=pack(noise) if flux else noise.clone(),
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="pt",
            **more,
        ).images
        red = ((images * 255).round() / 255)[:, 0].mean()
        assert rows[weights, 1.0]["metrics"]["reward"] == pytest.approx(float(red), abs=1e-4), weights
    rewards = [rows[weights, 1.0]["metrics"]["reward"] for weights in ("base", "evaluation")]
    assert abs(rewards[0] - rewards[1]) > 1e-3
    assert rows["evaluation", 1.0]["metrics"]["drift"] > 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"text_encoder.q.lora_A.weight": (2, 3)}, "changes a text encoder too"),
        ({"transformer.q.lora_A.weight": (2, 3), "transformer.q.lora_B.weight": (4, 2)}, "a LoRA of another model"),
    ],
)
def test_loras_that_cannot_be_used(
    evaluating: Compose, tmp_path: Path, state: dict[str, tuple[int, ...]], message: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in state.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        evaluate(evaluating(f"lora={tmp_path / 'lora.safetensors'}", "label=x"))


def test_a_whole_checkpoint_and_its_denoiser_alone(
    tiny_run: Compose, evaluating: Compose, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = tiny_sd3(tmp_path / "other", seed=1)
    whole = evaluate(evaluating(f"checkpoint={other}", "label=other"))
    itself = evaluate(evaluating("name=elsewhere", run_overrides=(f"model.policy.source={other}", "name=elsewhere")))
    expected = final_rows(itself)["base", 1.0]["metrics"]
    found = final_rows(whole)["evaluation", 1.0]["metrics"]
    assert "drift" not in found  # the base's weights are not there any more
    assert found == {name: value for name, value in expected.items() if name != "drift"}
    assert final_rows(whole)["base", 1.0]["metrics"]["reward"] != found["reward"]

    again = tmp_path / "again"
    shutil.copytree(tiny_checkpoint, again)
    shutil.rmtree(again / "transformer")
    shutil.copytree(other / "transformer", again / "transformer")
    mixed = evaluate(evaluating("name=mixed", run_overrides=(f"model.policy.source={again}", "name=mixed")))
    alone = evaluate(evaluating(f"checkpoint={other / 'transformer'}", "label=denoiser"))
    assert final_rows(alone)["evaluation", 1.0]["metrics"]["reward"] == pytest.approx(
        final_rows(mixed)["base", 1.0]["metrics"]["reward"], abs=1e-6
    )
    assert final_rows(alone)["evaluation", 1.0]["metrics"]["drift"] > 0


def test_images_that_were_written_get_the_scores_that_they_had(evaluating: Compose, tmp_path: Path) -> None:
    photo = {"_target_": "tests.stand_ins.Red"}
    config = evaluating("save_images=true")
    scored = evaluate(config)
    saved = scored / "samples"
    assert (saved / "final_base_g1" / "00003" / "samples" / "0001.png").exists()
    config = evaluating(
        f"images={saved / 'final_base_g3'}", f"base_images={saved / 'final_base_g1'}", "guidance=3", "label=guided"
    )
    with open_dict(config):
        config.model.domain, config.reward.parts.red.photo = "photo", photo
    folder = evaluate(config)
    base, guided = rows_of(folder)
    for row, guidance in ((base, 1.0), (guided, 3.0)):
        expected = final_rows(scored)["base", guidance]
        assert row["metrics"] == {"reward": expected["metrics"]["reward"]}
        assert row["standard_errors"] == expected["standard_errors"]
        assert row["protocol_hash"] == guided["protocol_hash"] != expected["protocol_hash"]
        own, others = (
            json.loads((at / each["scores"]).read_text())["metrics"] for at, each in ((folder, row), (scored, expected))
        )
        assert own == others

    index = tmp_path / "flat"
    index.mkdir()
    lines = []
    for number, part in enumerate(sorted((saved / "final_base_g3").glob("*/samples/*.png"))):
        shutil.copy(part, index / f"{number}.png")
        record = json.loads((part.parents[1] / "metadata.jsonl").read_text())
        lines.append(json.dumps({"prompt": record["prompt"], "image": f"{number}.png"}))
    (index / "images.jsonl").write_text("\n".join(lines))
    config = evaluating(f"images={index}", "guidance=3", "label=flat")
    with open_dict(config):
        config.model.domain, config.reward.parts.red.photo = "photo", photo
    (flat,) = rows_of(evaluate(config))
    assert (flat["metrics"], flat["protocol_hash"]) == (guided["metrics"], guided["protocol_hash"])


def image_folder(folder: Path, images: dict[str, int], size: tuple[int, int] = (32, 32), tag: str = "colors") -> Path:
    for number, (text, count) in enumerate(images.items()):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"tag": tag, "prompt": text}))
        for image in range(count):
            Image.new("RGB", size).save(samples / f"{image:04d}.png")
    return folder


def test_image_folders_that_cannot_be_used(evaluating: Compose, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, *more: str) -> None:
        with pytest.raises(AlignbenchError, match=message):
            evaluate(evaluating(f"images={folder}", "guidance=1", "label=x", *more))

    refused(tmp_path / "nowhere", "nowhere: no such folder of images")
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "bare" / "0.png")
    refused(tmp_path / "bare", "bare: images without prompts")
    refused(image_folder(tmp_path / "none", {"a": 0}), "no image of this prompt")
    refused(image_folder(tmp_path / "count", {"a": 2, "b": 1}), "1 images of 'b', but 2 of the first prompt of its tag")
    refused(image_folder(tmp_path / "side", {"a": 1}, (64, 64)), "images of 64 x 64 pixels, those of the embedded")
    two = image_folder(tmp_path / "two", {"a": 1, "b": 1})
    Image.new("RGB", (16, 16)).save(two / "00001" / "samples" / "0000.png")
    refused(two, "16 x 16 pixels, but the images before have 32 x 32")
    (two / "00001" / "samples" / "0000.png").write_bytes(b"no image")
    refused(two, "not an image that can be read")
    one, other = (image_folder(tmp_path / name, {name: 1}) for name in ("one", "other"))
    refused(one, "base and other images need the same prompts", f"base_images={other}")
    (other / "00000" / "metadata.jsonl").write_text("{}")
    refused(other, 'expected an object with a non-empty "prompt"')
    assert not (tmp_path / "results").exists()


def test_a_part_of_a_suite_says_so_and_has_a_protocol_of_its_own(
    evaluating: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(*texts: str) -> dict[str, Any]:
        folder = image_folder(tmp_path / f"{len(texts)}", dict.fromkeys(texts, 1))
        config = evaluating(f"images={folder}", "guidance=1", f"label=of{len(texts)}")
        with open_dict(config):
            config.prompts = {"source": "geneval", "split": "train", "path": None, "balance": "tag"}
            config.model.domain, config.reward.parts.red.photo = "photo", {"_target_": "tests.stand_ins.Red"}
        return json.loads((evaluate(config) / "run.json").read_text())

    runs = [score("a photo of a bench"), score("a photo of a bench", "a photo of a cow")]
    assert runs[0]["final_protocol_hash"] != runs[1]["final_protocol_hash"]
    assert [scored["final_protocol"]["part"] for scored in runs] == [
        f"{n} of the 553 prompts of its suite" for n in (1, 2)
    ]
    told = capsys.readouterr().err
    for count, scored in enumerate(runs, start=1):
        assert f"{tmp_path / str(count)}: {count} of the 553 prompts of its suite" in told
        assert scored["final_protocol_hash"] in told
    assert "part" not in score("a photo of a bench", "a photo of a cow", "something else")["final_protocol"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=a", "images=b", "label=x"], "lora and images are given"),
        (["lora=a"], "label=NAME is missing: the name of this lora's row"),
        (["images=a", "label=x"], "guidance=G is the scale that images"),
        (["guidance=2"], "guidance=G is the scale that images"),
        (["base_images=a"], "base_images stand beside images=FOLDER"),
        (["lora=/nowhere", "label=x"], "no such file or folder"),
        (["checkpoint=/nowhere/sd3", "label=x"], "/nowhere/sd3"),
        (["label=a/b"], "label is 'a/b': it names a folder"),
        (["protocol=other"], "protocol is 'other': choose curve or final"),
    ],
)
def test_requests_that_cannot_work(evaluating: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError, DataError)) as raised:
        evaluate(evaluating(*overrides))
    assert message in str(raised.value)


def test_a_checkpoint_is_looked_at_before_the_base_is_scored(
    evaluating: Compose, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    monkeypatch.setattr(assembly, "pretrained", None)  # nothing is loaded
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        evaluate(evaluating(f"checkpoint={broken}", "label=theirs"))
