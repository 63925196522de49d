"""``python experiments/plans.py``: write the dry run of every recipe for real models into its README.

Takes no weights and no downloads: data sets of the hub are replaced by small ones with the same columns, which changes
no row of a plan (evaluations look at a fixed number of prompts).
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import datasets
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from alignbench import plan
from alignbench.architecture import Costs
from alignbench.configuration import CONF, plain, run_folder
from alignbench.processes import Processes

EXPERIMENTS = Path(__file__).parent
DOCS = EXPERIMENTS.parent / "docs"
RECIPES = (
    "diffusion_nft_geneval_sd35",
    "flow_grpo_geneval_sd35",
    "tempflow_grpo_geneval_sd35",
    "srpo_hpsv2_flux",
    "diffusion_sdpo_sd15",
    "diffusion_sdpo_sdxl",
)
BLOCK = re.compile(r"(?<=<!-- plan -->\n```\n).*?(?=\n```\n<!-- end of plan -->)", re.DOTALL)
TABLE = re.compile(r"(?<=\|---\|---\|---\|---\|---\|---\|---\|---\|\n)\| `sd35_medium`.*?(?=\n\n)", re.DOTALL)
MODELS = (
    ("sd35_medium", "lora"),
    ("sd15", "lora"),
    ("sd15", "full"),
    ("sdxl", "lora"),
    ("sdxl", "full"),
    ("flux_dev", "lora"),
    ("flux_dev", "full"),
)
DEVICES = (24, 48, 80, 141)  # GB
PROMPTS = 1000  # of a split: more than an evaluation looks at
PAIRS = 100_000  # more than a recipe takes


def stand_ins(folder: Path) -> list[str]:
    """Overrides that lead to data sets, in this folder, with the columns of the real ones."""
    prompts, pairs = folder / "prompts", folder / "pairs"
    saved = datasets.DatasetDict()
    for split in ("train", "validation_unique", "test", "test_unique"):
        texts = [f"{split} prompt {number}" for number in range(PROMPTS)]
        saved[split] = datasets.Dataset.from_dict({"prompt": texts, "caption": texts})
    saved.save_to_disk(str(prompts))
    pair = {"caption": "a prompt", "jpg_0": b"", "jpg_1": b"", "label_0": 1.0, "label_1": 0.0, "has_label": True}
    datasets.Dataset.from_dict({column: [value] * PAIRS for column, value in pair.items()}).save_to_disk(str(pairs))
    return [f"prompts.path={prompts}", f"method.algorithm.dataset.path={pairs}"]


def composed(recipe: str, *overrides: str) -> DictConfig:
    """The configuration of a recipe."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"experiment={recipe}", "dry_run=true", "device=cpu", *overrides])


def on_stand_ins(recipe: str, folder: Path) -> DictConfig:
    """The configuration of a recipe, with stand-ins for the data sets that it takes from elsewhere."""
    own = composed(recipe)
    taken = {"prompts.path": own.prompts.path, "method.algorithm.dataset.path": own.method.algorithm.get("dataset")}
    return composed(recipe, *(each for each in stand_ins(folder) if taken[each.partition("=")[0]]))


def planned(recipe: str, folder: Path, known: dict[str, Costs]) -> str:
    """The dry run of a recipe; ``folder`` is empty, for stand-ins; ``known`` keeps what models cost."""
    datasets.disable_progress_bars()
    config = on_stand_ins(recipe, folder)
    model = json.dumps(plain(config)["model"], sort_keys=True)
    if model not in known:
        known[model] = plan.model_costs(config)
    return plan.dry_run(config, Processes("cpu"), run_folder(config, []), known[model])[0]


def memory_table(models: Iterable[tuple[str, str]] = MODELS) -> str:
    """Rows of docs/real_models.md: what a process holds, and how many samples with a gradient fit beside it."""
    lines = []
    for model, trainable in models:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            found = plan.model_costs(compose("config", [f"model={model}", f"model.policy.trainable={trainable}"]))
        _, fixed = plan.resident(found, views=2, processes=8)
        room = [max(0, int((size * 1e9 - fixed) // found.sample)) for size in DEVICES]
        cells = [f"`{model}`", trainable, plan.gb(fixed), plan.gb(found.sample), *(str(each or "no") for each in room)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the plans of all recipes, or of those that are named; ``models``: the table of docs/real_models.md."""
    known: dict[str, Costs] = {}
    asked = sys.argv[1:] or ["models", *RECIPES]
    if "models" in asked:
        page = DOCS / "real_models.md"
        told = memory_table()
        page.write_text(TABLE.sub(lambda _: told, page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{page}\n{told}")
    for recipe in (each for each in asked if each != "models"):
        readme = EXPERIMENTS / recipe / "README.md"
        with tempfile.TemporaryDirectory() as folder:
            told = planned(recipe, Path(folder), known)
        readme.write_text(BLOCK.sub(lambda _, told=told: told, readme.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{readme}\n{told}")


if __name__ == "__main__":
    main()
