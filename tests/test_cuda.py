"""The embedded world on a GPU: the same latents and the same update as on the CPU, in float32.

Run as ``python -m tests.test_cuda DEVICE METHOD FILE``, it writes what an iteration made; each device has a process of
its own, since the processes of a run are bound to one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
METHODS = ["diffusion_nft", "flow_grpo"]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def iteration(method: str, device: str) -> dict[str, Tensor]:
    """Rollout and one optimizer step under a smooth reward; everything on the CPU, float32."""
    from alignbench import assembly
    from alignbench.configuration import CONF
    from alignbench.methods.method import Clock
    from alignbench.prompts.sets import draw
    from alignbench.training import optimizer_step

    with initialize_config_dir(str(CONF), version_base="1.3"):
        batch = ["method.batch.prompts=4", "method.batch.images=4", "method.batch.updates=1", "micro_batch=16"]
        quiet = ["evaluation.features=null", "progress=false", "threads=1"]
        config = compose("config", [f"method={method}", f"device={device}", *batch, *quiet])
    with open_dict(config):
        config.evaluation.scorers = {}
        red = {"weight": 1.0, "shapes": {"_target_": "tests.stand_ins.Red"}}
        config.reward = {"parts": {"red": red}, "targets": {}, "normalisation": {}}
    parts = assembly.assemble(config)
    assert parts.policy.device.type == device
    before = {name: each.detach().clone() for name, each in parts.policy.trainable_parameters().items()}
    experience = parts.method.collect(parts.stack, draw(parts.prompts, 4, 0, 0), Clock())
    update = next(parts.method.updates(experience, parts.stack, Clock()))
    metrics, _ = optimizer_step(parts.stack, parts.method, update, parts.optimizer, clip=1.0)
    after = parts.policy.trainable_parameters()
    latents = experience.terms["x_0" if method == "diffusion_nft" else "next_latents"]
    change = torch.cat([(after[name] - before[name]).detach().flatten() for name in before])
    made = {"latents": latents, "change": change}
    made |= {name: torch.tensor(metrics[name]) for name in ("loss", "gradient_norm")}
    return {name: each.float().cpu().contiguous() for name, each in made.items()}


def made_on(device: str, method: str, folder: Path) -> dict[str, Tensor]:
    """What a process of its own makes on a device, without reduced precision."""
    file = folder / f"{device}_{method}.safetensors"
    command = [sys.executable, "-m", "tests.test_cuda", device, method, str(file)]
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return load_file(file)


def agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal up to what other orders of summation do in float32.

    AdamW's first step is the sign of the gradient, so where that is nearly zero the change of a weight may turn around:
    the direction of the whole change is compared.
    """
    torch.testing.assert_close(one["latents"], other["latents"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one["gradient_norm"], other["gradient_norm"], rtol=1e-2, atol=0)
    torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-2, atol=1e-5)
    assert one["change"].norm() > 0
    assert torch.cosine_similarity(one["change"], other["change"], dim=0) > 0.98


@cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_agrees_with_the_cpu(method: str, tmp_path: Path) -> None:
    agree(made_on("cpu", method, tmp_path), made_on("cuda", method, tmp_path))


def test_the_comparison_notices_another_update(tmp_path: Path) -> None:
    """On the CPU alone: what a process made agrees with itself, and not with other latents or weights."""
    one = made_on("cpu", "diffusion_nft", tmp_path)
    agree(one, one)
    for name, value in (("latents", one["latents"] + 0.01), ("change", -one["change"]), ("loss", one["loss"] + 0.1)):
        with pytest.raises(AssertionError):
            agree(one, one | {name: value})


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    save_file(iteration(sys.argv[2], sys.argv[1]), sys.argv[3])
