"""The model card of exported weights, in the format of the Hugging Face hub: what they are and what they scored."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignbench.records import Run

NAME = "README.md"
PICTURE = "curve.png"
EMBEDDED = "embedded:"
LOAD = {
    "lora": 'pipe.load_lora_weights("path/to/this/folder")',
    "full": 'pipe.transformer = AutoModel.from_pretrained("path/to/this/folder")  # pipe.unet of a U-Net',
}

SCHEDULER = (
    "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)"
)


def write(run: Run, folder: Path) -> None:
    """Write the card of a run, with a picture of its curve where matplotlib is installed, beside its weights."""
    picture = curve(run)
    if picture is not None:
        (folder / PICTURE).write_bytes(picture)
    (folder / NAME).write_text(card(run, picture is not None), encoding="utf-8")


def curve(run: Run) -> bytes | None:
    """A PNG of the trained reward over the budget; None without matplotlib or recorded scores."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # the extra "report"
        return None
    rows = [
        row
        for row in run.evaluations
        if row["protocol_hash"] == run.run["protocol_hash"] and row["weights"] in ("base", "evaluation")
    ]
    if not rows:
        return None
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [100 * row["fraction"] for row in rows],
        [row["metrics"]["reward"] for row in rows],
        [row["standard_errors"].get("reward", 0.0) for row in rows],
        marker="o", capsize=2,
    )  # fmt: skip
    axes.set_xlabel("budget used, %")
    axes.set_ylabel(f"{run.run['reward']}, one standard error")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def card(run: Run, picture: bool = False) -> str:
    """Markdown with a YAML header, from the records of a run alone.

    `picture`: the folder holds one of the curve, to be shown. The licence is left to whoever publishes the weights. A
    path of this machine stands there by its last part only.
    """
    model, method, trainable = run.config["model"], run.run["method"], run.config["model"]["policy"]["trainable"]
    source = str(model["policy"]["source"])
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    base = source if on_hub or source.startswith(EMBEDDED) else Path(source).name
    tags = ["text-to-image", "diffusers", *(["lora"] if trainable == "lora" else []), "reinforcement-learning"]
    header = {
        **({"base_model": source} if on_hub else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*tags, "alignbench", method],
    }
    detected = "geneval" in run.run["reward"] and model.get("domain") == "photo"  # not by the official detector
    git = run.run.get("git", {})
    facts = [
        ("method", f"{method}{'@' + run.run['variant'] if run.run.get('variant') else ''}"),
        ("reward", run.run["reward"] + (" (detector: geneval-hf)" if detected else "")),
        ("base model", f"{base} (`model={model['name']}`)"),
        ("weights", f"{'LoRA' if trainable == 'lora' else 'full denoiser'}, average over the last part of the budget"),
        ("seed", run.run["seed"]),
        ("budget", ", ".join(f"{axis} {limit:.4g}" for axis, limit in run.run.get("budget", {}).items())),
        ("configuration", run.run["config_hash"]),
        ("code", f"alignbench {git.get('commit') or 'outside a checkout'}{', changed' if git.get('dirty') else ''}"),
    ]
    parts = [
        f"---\n# license: yours to add; the terms of the base model hold too\n{_dump(header)}---\n",
        f"# {model['name']} trained by {method} on {run.run['reward']}\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in facts),
        *([f"![{run.run['reward']} on held-out prompts over the budget]({PICTURE})\n"] if picture else []),
        *_scores(run),
        "## Use\n",
        _code(base, model["policy"], run.run["final_protocol"]),
        "## Method\n",
        f"```yaml\n{_dump(run.config['method'])}```\n",
    ]
    return "\n".join(parts)


def _dump(value: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text


def _scores(run: Run) -> list[str]:
    """The final scores beside the base model's, with standard errors; nothing where none were recorded."""
    final = run.run.get("final_protocol_hash")
    rows = [
        row for row in run.evaluations if row["protocol_hash"] == final and row["weights"] in ("base", "evaluation")
    ]
    if not rows:
        return []
    protocol = run.run["final_protocol"]
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"] if "/" not in name))
    lines = [
        "## Scores\n",
        f"Protocol `{protocol['name']}` {final}: {protocol['images']} images of {protocol['prompts']} prompts, "
        f"{protocol['steps']} {protocol['solver']} steps; mean ± standard error over prompts. `reward` is the reward "
        "that was trained on.\n",
        f"| weights | guidance | {' | '.join(metrics)} |",
        f"|---|---|{'---|' * len(metrics)}",
    ]
    for row in rows:
        cells = []
        for name in metrics:
            error = row["standard_errors"].get(name)
            value = f"{row['metrics'][name]:.4f}" if name in row["metrics"] else ""
            cells.append(value if error is None else f"{value} ± {error:.4f}")
        weights = "base model" if row["weights"] == "base" else "these"
        lines.append(f"| {weights} | {row['guidance']:g} | {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def _code(base: str, policy: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """How to draw an image as the protocol does."""
    full, noise = policy["trainable"] == "full", ".unet." in policy.get("_target_", "")  # a U-Net predicts the noise
    classes = [*(["AutoModel"] if full else []), *(["DDIMScheduler"] if noise else []), "DiffusionPipeline"]
    lines = [f"from diffusers import {', '.join(classes)}"]
    source = f'"{base}"'
    if base.startswith(EMBEDDED):
        lines.append("from alignbench.configuration import embedded")
        source = f"embedded({source})"
    tokens, side = policy.get("max_sequence_length"), policy.get("resolution")
    absent = ", text_encoder_3=None, tokenizer_3=None" if tokens == 0 else ""
    lines += ["", f"pipe = DiffusionPipeline.from_pretrained({source}{absent})", LOAD[policy["trainable"]]]
    lines += [SCHEDULER] if noise else []
    guidance, own = protocol["guidance"][0], policy.get("guidance_embedding")
    settings = [f"num_inference_steps={protocol['steps']}", f"guidance_scale={guidance if own is None else own:g}"]
    if own is not None and guidance > 1:  # FLUX: guidance beside the one that is its input
        settings += [f"true_cfg_scale={guidance:g}", 'negative_prompt=""']
    settings += [f"max_sequence_length={tokens}"] if tokens is not None else []
    settings += [f"height={side}, width={side}"] if side is not None else []
    lines.append(f'image = pipe("a prompt", {", ".join(settings)}).images[0]')
    return "```python\n" + "\n".join(lines) + "\n```\n"
