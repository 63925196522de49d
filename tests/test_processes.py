"""One and two processes take the same steps."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def launched(folder: Path, processes: int, method: str, micro_batch: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer moments after two iterations in float64, from the command line."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [
        f"method={method}",
        "overlay=none",
        "method.batch.prompts=3",
        "method.batch.images=5",
        "method.batch.updates=1",
        "method.rollout.steps=3",
        f"results={folder}",
        f"micro_batch={micro_batch}",
        "model.policy.dtype=float64",
        "budget.flops=null",
        "budget.iterations=2",
        "evaluation.fractions=[0,1]",
        "evaluation.curve.images_per_tag=1",
        "evaluation.final.images_per_tag=1",
        "device=cpu",
        "progress=false",
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "alignbench", *arguments]
    subprocess.run(command, check=True, timeout=600, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (checkpoint,) = folder.rglob("step_2")
    return load_file(checkpoint / "policy.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def test_two_processes_and_uneven_micro_batches_give_the_same_gradients_and_weights(tmp_path: Path) -> None:
    for method in ("diffusion_nft", "flow_grpo"):
        one = launched(tmp_path / f"{method}1", 1, method, micro_batch=64)
        two = launched(tmp_path / f"{method}2", 2, method, micro_batch=7)
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)
        moved = [name for name in one if name.endswith("exp_avg") and one[name].abs().max() > 0]
        assert moved
