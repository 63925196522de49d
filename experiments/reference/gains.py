"""``python experiments/reference/gains.py``: write what each method gained, as recorded, into the pages that say so.

The report's tables go into tables.md, pictures of what PickScore does to the samples into samples.png.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from PIL import Image

from alignbench.records import read_run
from alignbench.report import across, claims, matched, tables, verdict
from alignbench.report.answer import answer
from alignbench.report.data import UNTUNED, Comparison, Records, load
from alignbench.report.tables import Entry, entries

REFERENCE = Path(__file__).parent
ROOT = REFERENCE.parent.parent
PAGES = (ROOT / "README.md", REFERENCE / "README.md", *sorted((ROOT / "docs" / "methods").glob("*.md")))
TABLES = REFERENCE / "tables.md"
HEAD = """# Tables of the reference benchmark

Written by `python experiments/reference/gains.py`. They are those of the page that
`python -m alignbench.report results/reference --output build/reference` draws; beside it lie the same tables as CSV and
LaTeX, and every evaluation. The last table is read from the runs' `metrics.jsonl`.
Methods have the names of their configurations.
"""
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
    "dmpo": "DMPO (untuned)",
    "dpo": "Diffusion-DPO (untuned)",
    "direct_align": "Direct-Align (untuned)",
    "refl": "ReFL (untuned)",
    "draft": "DRaFT (untuned)",
}
REWARDS = {"geneval_strict": "GenEval (strict)", "exact_scene": "exact scene", "pickscore": "PickScore"}
INSIDE = (
    "reward",
    "constant_groups",
    "clip_fraction",
    "gradient_norm",
    "ratio_deviation/first_update",
    "hinge_active",
    "winner_error_change",
    "loser_error_change",
    "lambda_below_one",
)
METRICS = {  # column: decimals
    "exact_scene": ("exact scene", 3),
    "geneval": ("GenEval", 3),
    "pickscore": ("PickScore", 2),
    "judge": ("second judge", 2),
    "diversity": ("diversity", 3),
}


def gains(records: Records, guidance: float, methods: Collection[str]) -> str:
    """A table: the base as it is, then what each method adds at a guidance; ``**``: the interval excludes 0."""
    (study,), protocols = records.studies, records.protocols
    columns = ["trained on", "method", "seeds", *(title for title, _ in METRICS.values()), "drift"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    scales = study.comparisons[0].runs[0].run["final_protocol"]["guidance"]
    lines += [_base(study.comparisons[0], scale) for scale in scales]
    for reward in REWARDS:
        for comparison in (each for each in study.comparisons if each.reward == reward):
            lines += _methods(comparison, guidance, methods)
    (key,) = {run.final_hash for run in study.runs}
    return "\n".join([*lines, "", f"Protocol {tables.protocol_title(protocols, key)}, guidance {guidance:g}."])


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
    trained = {name: entry for entry in found if (name := entry.label.removesuffix(UNTUNED)) in methods}
    for name, entry in sorted(trained.items(), key=lambda item: -item[1].difference(key, "reward").mean):
        seeds = len(entry.rows)
        cells = [
            REWARDS[comparison.reward],
            NAMES[name],
            f"{seeds} (preview)" if seeds < tables.CLAIM_RUNS else f"{seeds}",
        ]
        for metric, (_, decimals) in METRICS.items():
            change = entry.difference(key, metric)
            text = f"{change.mean:+.{decimals}f}"
            text += f" ± {change.half_width:.{decimals}f}" if change.n > 1 else ""
            cells.append(f"**{text}**" if change.above(0) or change.below(0) else text)
        drift = entry.values("drift")
        yield f"| {' | '.join([*cells, f'{sum(drift) / len(drift):.2g}'])} |"


def page(records: Records) -> str:
    """The report's tables, from the answer to the claims, and what happened inside, as one document."""
    (study,), protocols = records.studies, records.protocols
    opening = answer(records)
    assert opening is not None
    found = [
        opening.table,
        *(each.table for each in verdict.verdicts(study, protocols)),
        *tables.headline(study, protocols),
        across.pairs(study),
        across.methods(study),
        *matched.matched(study, protocols),
        *tables.efficiency(study, protocols),
        *tables.geneval(study, protocols),
        claims.table(claims.findings(records, claims.read(ROOT / "experiments" / "claims"))),
    ]
    written = (re.sub("^### ", "## ", tables.markdown(table)) for table in found)
    return "\n".join([HEAD, *written, inside(records)])


def inside(records: Records) -> str:
    """What the texts quote from inside training: means over iterations, the least and the most of the runs."""
    spans = {
        "all iterations": lambda values: values,
        "second half": lambda values: values[len(values) // 2 :],
        "first tenth": lambda values: values[: max(1, len(values) // 10)],
        "last tenth": lambda values: values[-max(1, len(values) // 10) :],
    }
    columns = ["trained on", "method", "metric", "iterations", *spans, "largest"]
    lines = [
        "## Inside training",
        "",
        "Means over iterations of `metrics.jsonl`: the least to the most of the runs.",
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for comparison in records.studies[0].comparisons:
        for label in comparison.labels:
            found = [read_run(run.folder).metrics for run in comparison.of(label)]
            for metric in INSIDE:
                runs = [[row[metric] for row in rows if row.get(metric) is not None] for rows in found]
                if not all(runs):
                    continue
                ranges = [[mean(part(values)) for values in runs] for part in spans.values()]
                cells = [comparison.reward, label, metric, _range([len(values) for values in runs], "d")]
                cells += [_range(each, ".3g") for each in ranges]
                lines.append(f"| {' | '.join([*cells, f'{max(map(max, runs)):.2g}'])} |")
    return "\n".join(lines) + "\n"


def _range(values: Collection[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def samples(results: Path) -> Figure:
    """Final samples at guidance 1 of seed 0 trained on PickScore, the same prompts and noises, beside the base's."""
    columns = {"base": ("srpo", "0001_final_base_g1")}
    columns |= {NAMES[name]: (name, "0014_final_evaluation_g1") for name in ("srpo", "sdpo", "direct_align")}
    figure = Figure(figsize=(7.6, 6.2), layout="constrained")
    for axes, (title, (method, picture)) in zip(figure.subplots(1, len(columns)), columns.items(), strict=True):
        with Image.open(results / "shapes" / "pickscore" / method / "seed0" / "images" / f"{picture}.png") as image:
            axes.imshow(image.convert("RGB"), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure


def main() -> None:
    """Rewrite the tables of all pages."""
    records = load([ROOT / "results" / "reference"])

    def written(block: re.Match[str]) -> str:
        methods = block["methods"].split() or list(NAMES)
        return block[0].replace(block["table"], gains(records, float(block["guidance"]), methods))

    for document in PAGES:
        document.write_text(BLOCK.sub(written, document.read_text(encoding="utf-8")), encoding="utf-8")
    TABLES.write_text(page(records), encoding="utf-8")
    samples(ROOT / "results" / "reference").savefig(REFERENCE / "samples.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
