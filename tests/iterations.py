"""Two iterations of a method of each kind, and an evaluation: on one process, or as a program of several.

``torchrun --nproc_per_node 2 -m tests.iterations CHECKPOINT FOLDER`` writes what every kind ended with to
FOLDER/<kind>.safetensors and FOLDER/<kind>.json, and FOLDER/evaluation.json. Nothing here divides by the number of
processes: 3 prompts x 5 images, 3 pairs, 3 trunks, 5 evaluated images.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from alignbench import assembly, optimizer
from alignbench.assembly import Parts
from alignbench.processes import Processes
from alignbench.run import Loop

CONF = Path(__file__).parent.parent / "conf"
PAIRS = ["method=sdpo", "method.algorithm.pairs_per_update=5", "method.rollout.guidance=1"]
ONE_IMAGE = ["method.batch.images=1", "method.batch.prompts=5"]
KINDS: dict[str, list[str]] = {
    "diffusion_nft": ["method=diffusion_nft"],
    "awm": ["method=awm", "method.algorithm.times=1"],
    "rwr": ["method=rwr", "method.algorithm.times=2"],
    "best_of_n": ["method=best_of_n", "method.algorithm.times=2"],
    "flow_grpo": ["method=flow_grpo", "method.batch.updates=3"],
    "dance_grpo": ["method=dance_grpo"],
    "mix_grpo": ["method=mix_grpo", "method.algorithm.window.size=1", "method.algorithm.window.last=2"],
    "tempflow_grpo": ["method=tempflow_grpo", "method.algorithm.seeds=1", "method.algorithm.branches=5"],
    "srpo": ["method=srpo", *ONE_IMAGE],
    "refl": ["method=refl", *ONE_IMAGE],
    "draft": ["method=draft", *ONE_IMAGE],
    "sdpo": PAIRS,
    "sdpo_of_a_batch": [*PAIRS, "method.algorithm.safeguard=batch"],
    "sdpo_of_a_dataset": [*PAIRS, "method.algorithm.pairs=dataset"],
    "dpo": [*PAIRS, "method=dpo"],
    "dspo": [*PAIRS, "method=dspo"],
    "direct_align": ["method=direct_align", *ONE_IMAGE],
}


def assembled(kind: str, checkpoint: Path, folder: Path, micro_batch: int, processes: Processes) -> tuple[Any, Parts]:
    """A run in float64 on the tiny checkpoint; the reward is smooth and reads the prompt."""
    (folder / "prompts.txt").write_text("ab\ncd\nef\ngh\nij\n")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "config",
            [
                "overlay=none",
                f"model.policy.source={checkpoint}",
                "model.policy.rank=4",
                "model.policy.dtype=float64",
                "prompts=file",
                f"prompts.path={folder / 'prompts.txt'}",
                "method.batch.prompts=3",
                "method.batch.images=5",
                "method.batch.updates=1",
                "method.rollout.steps=3",
                *KINDS[kind],
                *([f"method.algorithm.dataset.path={preferences(folder)}"] if "dataset" in kind else []),
                f"micro_batch={micro_batch}",
                "evaluation.curve.images_per_tag=5",
                "evaluation.curve.steps=2",
                "budget.flops=null",
                "budget.iterations=2",
                "device=cpu",
                "progress=false",
            ],
        )
    with open_dict(config):
        part = {"weight": 1.0, "shapes": {"_target_": "tests.stand_ins.Worded"}}
        config.reward = {"parts": {"worded": part}, "targets": {}, "normalisation": {}}
        del config.evaluation.scorers.judge
    return config, assembly.assemble(config, processes)


def preferences(folder: Path) -> Path:
    """A data set of five pairs of 16 x 16 images with Pick-a-Pic's columns, this process's own copy."""
    colours = [[40 * number, 255 - 40 * number, 128] for number in range(6)]
    images = []
    for colour in colours:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), tuple(colour)).save(file, "png")
        images.append(file.getvalue())
    table = {"caption": ["ab", "cd", "ef", "gh", "ij"], "jpg_0": images[:5], "jpg_1": images[1:]}
    table |= {"label_0": [1.0, 0.0, 1.0, 0.0, 1.0], "label_1": [0.0, 1.0, 0.0, 1.0, 0.0], "has_label": [True] * 5}
    path = folder / str(os.getpid()) / "pairs"
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table).save_to_disk(str(path))
    return path


def iterated(
    kind: str, checkpoint: Path, folder: Path, micro_batch: int, processes: Processes
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Views, optimizer moments and rows after two iterations."""
    config, parts = assembled(kind, checkpoint, folder, micro_batch, processes)
    loop = Loop(config, parts, None, tracker=None, stopping=[])
    rows = [loop.iterate() for _ in range(2)]
    for row in rows:
        row.pop("volatile")
    moments = optimizer.state_of(parts.optimizer, parts.policy)
    return {**parts.policy.state_dict(), **{f"moments/{name}": value for name, value in moments.items()}}, rows


def evaluated(checkpoint: Path, folder: Path, micro_batch: int, processes: Processes) -> dict[str, Any]:
    """What an evaluation of the untrained model measures and costs."""
    _, parts = assembled("diffusion_nft", checkpoint, folder, micro_batch, processes)
    parts.evaluator.sample_reference()
    result = parts.evaluator(parts.curve, view="current", guidance=1.0)
    cost = parts.ledger.row(lambda values: processes.join(values, sum))["phases"]["evaluation"]
    return {"metrics": result.metrics, "errors": result.standard_errors, "scores": result.scores, "cost": cost}


def main() -> None:
    """Everything on all processes; the first one writes."""
    torch.set_num_threads(1)
    checkpoint, folder = map(Path, sys.argv[1:])
    processes = Processes("cpu")
    with processes.together():
        for kind in KINDS:
            tensors, rows = iterated(kind, checkpoint, folder, 3, processes)
            if processes.main:
                tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
                save_file(tensors, folder / f"{kind}.safetensors")
                (folder / f"{kind}.json").write_text(json.dumps(rows))
        result = evaluated(checkpoint, folder, 3, processes)
        if processes.main:
            (folder / "evaluation.json").write_text(json.dumps(result | {"processes": processes.count}))


if __name__ == "__main__":
    main()
