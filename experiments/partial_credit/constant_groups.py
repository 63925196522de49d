"""``python experiments/partial_credit/constant_groups.py``: groups without signal, by method and reward.

Writes constant_groups.md: of 20 iterations' images by the embedded base model, at each method's embedded settings, the
share of groups whose images all have one reward. Twenty minutes on one core.
"""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from alignbench import assembly
from alignbench.configuration import CONF
from alignbench.methods.method import Clock
from alignbench.prompts.sets import draw

PAGE = Path(__file__).parent / "constant_groups.md"
ITERATIONS = 20
REWARDS = {"geneval_strict": "strict rule (before)", "geneval": "partial credit (now)", "exact_scene": "exact scenes"}
METHODS = {  # what a group is
    "diffusion_nft": "8 images of a prompt",
    "flow_grpo": "8 images of a prompt, noise 0.4",
    "flow_grpo_fast": "8 images of a prompt",
    "dance_grpo": "8 images of a prompt, one initial noise",
    "mix_grpo": "8 images of a prompt, one initial noise",
    "tempflow_grpo": "6 branches of a seed at a step",
    "awm": "8 images of a prompt",
    "rwr": "8 images of a prompt",
    "best_of_n": "8 images of a prompt",
    "sdpo": "4 images of a prompt",
}
HEAD = f"""# Groups without signal

Written by `python experiments/partial_credit/constant_groups.py`: {ITERATIONS} iterations of images by the embedded
base model, at each method's embedded settings. A group whose images all have one reward teaches nothing.

| method | a group | {" | ".join(REWARDS.values())} |
|---|---|{"---|" * len(REWARDS)}
"""


def share(method: str, reward: str) -> float:
    """The mean share of groups without signal."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"method={method}", f"reward={reward}", "threads=1"])
    parts = assembly.assemble(config)
    found = []
    for iteration in range(ITERATIONS):
        prompts = draw(parts.prompts, parts.method.batch.prompts, config.seed, iteration, config.prompts.balance)
        metrics = parts.method.collect(parts.stack, prompts, Clock(iteration=iteration)).metrics
        found.append(metrics["constant_groups"] if "constant_groups" in metrics else metrics["tied_prompts"])
    return sum(found) / len(found)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    lines = []
    for method, group in METHODS.items():
        shares = " | ".join(f"{share(method, reward):.2f}" for reward in REWARDS)
        lines.append(f"| {method} | {group} | {shares} |\n")
    PAGE.write_text(HEAD + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
