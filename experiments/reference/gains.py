"""``python experiments/reference/gains.py``: write what each method gained, as recorded, into the pages that say so."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from alignbench.report.data import Comparison, Study, load
from alignbench.report.tables import Entry, entries

REFERENCE = Path(__file__).parent
ROOT = REFERENCE.parent.parent
PAGES = (ROOT / "README.md", REFERENCE / "README.md", *sorted((ROOT / "docs" / "methods").glob("*.md")))
BLOCK = re.compile(
    r"<!-- gains at guidance (?P<guidance>\d)(?P<methods>( \w+)*) -->\n(?P<table>.+?)\n<!-- end of gains -->", re.DOTALL
)
NAMES = {
    "diffusion_nft": "DiffusionNFT",
    "flow_grpo": "Flow-GRPO",
    "tempflow_grpo": "TempFlow-GRPO",
    "sdpo": "Diffusion-SDPO",
    "srpo": "SRPO",
    "rwr": "RWR",
    "best_of_n": "best-of-n",
}
REWARDS = {"geneval": "GenEval", "exact_scene": "exact scene", "pickscore": "PickScore"}
METRICS = {  # column: decimals
    "exact_scene": ("exact scene", 3),
    "geneval": ("GenEval", 3),
    "pickscore": ("PickScore", 2),
    "judge": ("second judge", 2),
    "diversity": ("diversity", 3),
}


def gains(study: Study, guidance: float, methods: Collection[str] = tuple(NAMES)) -> str:
    """A table: the base as it is, then what each method adds at a guidance; ``**``: the interval excludes 0."""
    columns = ["trained on", "method", "seeds", *(title for title, _ in METRICS.values()), "drift"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    scales = study.comparisons[0].runs[0].run["final_protocol"]["guidance"]
    lines += [_base(study.comparisons[0], scale) for scale in scales]
    for reward in REWARDS:
        for comparison in (each for each in study.comparisons if each.reward == reward):
            lines += _methods(comparison, guidance, methods)
    return "\n".join(lines)


def _scored(comparison: Comparison, guidance: float) -> tuple[str, list[Entry]]:
    (key,) = {run.final_hash for run in comparison.runs}
    return key, [entry for entry in entries(comparison, key) if entry.guidance == guidance]


def _base(comparison: Comparison, guidance: float) -> str:
    _, found = _scored(comparison, guidance)
    (row,) = {tuple(sorted(entry.rows[0].metrics.items())) for entry in found if not entry.label}
    scores = dict(row)
    cells = [f"{scores[metric]:.{decimals}f}" for metric, (_, decimals) in METRICS.items()]
    return f"| | base at guidance {guidance:g} | | {' | '.join(cells)} | |"


def _methods(comparison: Comparison, guidance: float, methods: Collection[str]) -> Iterator[str]:
    key, found = _scored(comparison, guidance)
    trained = [entry for entry in found if entry.label in methods]
    for entry in sorted(trained, key=lambda entry: -entry.difference(key, "reward").mean):
        cells = [REWARDS[comparison.reward], NAMES[entry.label], str(len(entry.rows))]
        for metric, (_, decimals) in METRICS.items():
            change = entry.difference(key, metric)
            text = f"{change.mean:+.{decimals}f}"
            text += f" ± {change.half_width:.{decimals}f}" if change.n > 1 else ""
            cells.append(f"**{text}**" if change.above(0) or change.below(0) else text)
        drift = entry.values("drift")
        yield f"| {' | '.join([*cells, f'{sum(drift) / len(drift):.2g}'])} |"


def main() -> None:
    """Rewrite the tables of all pages."""
    (study,) = load([ROOT / "results" / "reference"]).studies

    def written(block: re.Match[str]) -> str:
        methods = block["methods"].split() or list(NAMES)
        return block[0].replace(block["table"], gains(study, float(block["guidance"]), methods))

    for page in PAGES:
        page.write_text(BLOCK.sub(written, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
