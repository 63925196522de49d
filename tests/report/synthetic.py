"""Run directories as the harness writes them, with made-up numbers that follow closed forms.

Score of a run over the used fraction f of its budget, with seed offset s = 0.01 (seed - 1):
    start + (gain + s) f        so mean and spread over seeds 0, 1, 2 are known: gain, standard deviation 0.01 at f = 1
"""

import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BUDGET = 2.0e13  # FLOP
BASE = {"geneval": 0.30, "exact_scene": 0.20}
GUIDED_BONUS = 0.15
GAINS: dict[tuple[str, str], dict[str, float]] = {  # (method, reward) -> gain at the whole budget
    ("diffusion_nft", "geneval"): {"geneval": 0.25, "exact_scene": -0.12},
    ("flow_grpo", "geneval"): {"geneval": 0.10, "exact_scene": -0.02},
    ("diffusion_nft", "exact_scene"): {"geneval": 0.14, "exact_scene": 0.18},
    ("flow_grpo", "exact_scene"): {"geneval": 0.06, "exact_scene": 0.07},
}
STEPS_AT_BUDGET = {"diffusion_nft": 200, "flow_grpo": 400}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "curve": {"name": "curve", "version": 1, "split": "test", "images_per_tag": 120, "steps": 10, "guidance": [1.0]},
    "final": {
        "name": "final",
        "version": 1,
        "split": "test",
        "images_per_tag": 400,
        "steps": 10,
        "guidance": [1.0, 3.0],
    },
}
HASHES = {"curve": "c0ffee000001", "final": "f17a10000002"}


def metrics(method: str, reward: str, seed: int, fraction: float, guidance: float) -> dict[str, float]:
    """Scores of one evaluation."""
    gains = GAINS.get((method, reward), {"geneval": 0.1, "exact_scene": 0.05})
    offset = 0.01 * (seed - 1)
    bonus = GUIDED_BONUS * (1 - 0.8 * fraction) if guidance > 1 else 0.0
    scores = {name: start + bonus + (gains[name] + offset) * fraction for name, start in BASE.items()}
    scores |= {f"geneval/{tag}": scores["geneval"] + 0.05 * (2 - index) for index, tag in enumerate(TAGS)}
    scores["geneval_strict"] = scores["geneval"] - 0.02
    scores |= {
        "objects_per_image": 1.8 + 0.9 * fraction,
        "invalid_share": 0.05 + 0.02 * fraction,
        "pickscore": 21.0 + 0.4 * fraction,
    }
    scores |= {"judge": 0.6, "diversity": 0.31 - 0.1 * fraction, "drift": 0.02 * fraction}
    scores["reward"] = scores["exact_scene"] if reward == "exact_scene" else scores["geneval_strict"]
    return scores


def ledger(method: str, fraction: float, evaluations: int) -> dict[str, Any]:
    """Cumulative cost; all of it is proportional to the used budget but evaluation's."""
    nfe = round(240_000 * fraction)
    rollout = {
        "flops": 0.5 * BUDGET * fraction,
        "nfe": nfe // 3,
        "backward": 0,
        "images": nfe // 30,
        "reward_calls": nfe // 30,
    }
    training = {
        "flops": 0.5 * BUDGET * fraction,
        "nfe": nfe - nfe // 3,
        "backward": nfe // 3,
        "images": 0,
        "reward_calls": 0,
    }
    evaluation = {
        "flops": 1e11 * evaluations,
        "nfe": 7_360 * evaluations,
        "backward": 0,
        "images": 736 * evaluations,
        "reward_calls": 736 * evaluations,
    }
    total = {key: rollout[key] + training[key] for key in rollout}
    phases = {"rollout": rollout, "training": training, "evaluation": evaluation}
    return total | {
        "optimizer_steps": round(STEPS_AT_BUDGET.get(method, 300) * fraction),
        "wasted_nfe": 0,
        "phases": phases,
    }


def seconds(method: str, fraction: float, evaluations: int) -> dict[str, float]:
    slower = 1.2 if method == "flow_grpo" else 1.0
    clocks = {
        "rollout": 200 * slower * fraction,
        "reward": 20 * fraction,
        "training": 180 * fraction,
        "evaluation": 4.0 * evaluations,
    }
    return clocks | {"total": clocks["rollout"] + clocks["training"]}


@functools.cache
def grid(fraction: float) -> bytes:
    """A small picture that changes over training."""
    image = Image.new("RGB", (136, 408), (24, 26, 32))
    for row in range(12):
        for column in range(4):
            shade = (60 + 15 * row, 200 - 30 * column, int(60 + 180 * fraction))
            image.paste(shade, (34 * column + 10, 34 * row + 10, 34 * column + 24, 34 * row + 24))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_run(
    root: Path,
    method: str = "diffusion_nft",
    reward: str = "geneval",
    seed: int = 0,
    *,
    variant: str = "",
    experiment: str = "first",
    status: str = "done",
    message: str = "",
    until: float = 1.0,
    run: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    grids: bool = True,
) -> Path:
    """Write one run directory; `run` and `config` replace top-level fields. Returns the folder."""
    label = f"{method}@{variant}" if variant else method
    folder = root / experiment / "shapes" / reward / label.replace("/", "-") / f"seed{seed}"
    (folder / "images").mkdir(parents=True)
    method_config = {"name": method, "learning_rate": 3e-4 if method == "diffusion_nft" else 2e-4}
    settings = {"method": method_config, "reward": {"name": reward}, "seed": seed, "evaluation": {"steps": 10}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | dict(config or {})))
    described: dict[str, Any] = {
        "schema": 1, "experiment": experiment, "model": "shapes", "reward": reward, "method": method,
        "variant": variant, "seed": seed, "config_hash": f"{seed:012x}",
        "protocol": PROTOCOLS["curve"], "protocol_hash": HASHES["curve"],
        "final_protocol": PROTOCOLS["final"], "final_protocol_hash": HASHES["final"], "targets": {"geneval": 0.45},
        "normalisation": {"geneval": 1.0}, "budget": {"flops": BUDGET},
        "parameters": {"trainable": 300_000, "total": 2_300_000},
        "git": {"commit": "0123456789abcdef", "dirty": False}, "packages": {"torch": "2.15.0", "numpy": "2.4.6"},
        "hardware": {"cpu": "made up", "cores": 2, "gpu": None}, "threads": 1, "processes": 1,
        "created": "2026-11-20T12:00:00Z",
    } | dict(run or {})  # fmt: skip
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "status.json").write_text(
        json.dumps({"status": status, "message": message, "fraction": until, "updated": "2026-11-20T12:10:00Z"})
    )
    evaluations, iterations = [], []

    def evaluate(fraction: float, protocol: str, weights: str, guidance: float) -> None:
        number = len(evaluations)
        hash_field = "protocol_hash" if protocol == "curve" else "final_protocol_hash"
        name = f"images/{number:04d}_{weights}_g{guidance:g}.png" if grids else None
        if name:
            (folder / name).write_bytes(grid(fraction))
        evaluations.append(
            {
                "evaluation": number, "fraction": fraction, "iteration": round(100 * fraction), "protocol": protocol,
                "optimizer_steps": round(100 * fraction), "protocol_hash": described[hash_field],
                "weights": weights, "guidance": guidance, "prompts": 184, "images": 736,
                "metrics": metrics(method, reward, seed, fraction, guidance),
                "standard_errors": {"geneval": 0.012, "exact_scene": 0.011},
                "scores": None, "grid": name, "ledger": ledger(method, fraction, number + 1),
                "volatile": {"seconds": seconds(method, fraction, number + 1)},
            }
        )  # fmt: skip

    for guidance in (1.0, 3.0):
        evaluate(0.0, "final", "base", guidance)
    for fraction in FRACTIONS:
        if fraction <= until:
            evaluate(fraction, "curve", "evaluation" if fraction else "base", 1.0)
            iterations.append(
                {"iteration": round(100 * fraction), "optimizer_steps": round(100 * fraction), "reward": 0.4,
                 "ledger": ledger(method, fraction, 1),
                 "volatile": {"seconds": seconds(method, fraction, 1), "memory_mb": 900.0 + 10 * seed}}
            )  # fmt: skip
    if status == "done":
        for weights in ("evaluation", "current"):
            for guidance in (1.0, 3.0):
                evaluate(1.0, "final", weights, guidance)
    for name, rows in (("metrics.jsonl", iterations), ("evaluations.jsonl", evaluations)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_comparison(root: Path, seeds: int = 3, methods: tuple[str, ...] = ("diffusion_nft", "flow_grpo")) -> None:
    """Methods x {geneval, exact_scene} x seeds, all finished."""
    for reward in ("geneval", "exact_scene"):
        for method in methods:
            for seed in range(seeds):
                write_run(root, method, reward, seed)
