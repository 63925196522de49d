"""Where the numbers come from: cells that are missing, and commands that make the runs again."""

import itertools
import shlex
from pathlib import Path

from hydra import compose, initialize_config_dir

from alignbench.configuration import identity, run_folder, variant
from alignbench.report import provenance
from alignbench.report.data import load
from alignbench.report.page import build
from tests.report.synthetic import write_comparison, write_run

CONF = Path(__file__).parents[2] / "conf"


def test_cells_that_another_method_has_are_missing(tmp_path: Path) -> None:
    for reward, method, seeds in (
        ("geneval", "diffusion_nft", (0, 1, 2)), ("geneval", "flow_grpo", (0, 1)), ("geneval", "awm", (0, 2, 5)),
        ("exact_scene", "diffusion_nft", (0, 1)), ("exact_scene", "flow_grpo", (0, 1)), ("pickscore", "srpo", (7,)),
    ):  # fmt: skip
        for seed in seeds:
            write_run(tmp_path, method, reward, seed, until=0.0, grids=False)
    write_run(tmp_path, "flow_grpo", "geneval", 9, variant="beta=1", until=0.0, grids=False)  # lacks nothing
    write_run(tmp_path, "base", "geneval", 8, run={"kind": "evaluated"}, until=0.0, grids=False)  # not trained
    (study,) = load([tmp_path]).studies
    table = provenance.missing(study)
    assert [(row["trained_on"], row["method"], row["seed"]) for row in table.records] == [
        ("geneval", "awm", 1), ("geneval", "diffusion_nft", 5),
        ("geneval", "flow_grpo", 2), ("geneval", "flow_grpo", 5),
    ]  # fmt: skip
    assert table.title == "first, shapes: 4 missing cells"
    assert [[cell.text for cell in row.cells] for row in table.groups[0].rows] == [
        ["awm", "geneval", "1", "0, 2, 5"],
        ["diffusion_nft", "geneval", "5", "0, 1, 2"],
        ["flow_grpo", "geneval", "2, 5", "0, 1"],
    ]
    assert table.notes == (
        "Trained on geneval, the methods were not run with the same seeds: awm 0, 2, 5; diffusion_nft 0, 1, 2; "
        "flow_grpo 0, 1.",
    )


def test_the_page_counts_what_is_missing(tmp_path: Path) -> None:
    for method, seed in (("diffusion_nft", 0), ("diffusion_nft", 1), ("flow_grpo", 0)):
        write_run(tmp_path, method, seed=seed, until=0.0, grids=False)
    text = build([tmp_path], tmp_path / "report", lambda _: None).read_text()
    assert '<h3 id="missing">Missing: 1</h3>' in text
    assert '<strong>1 run is missing</strong>: <a href="#missing">' in text
    assert "the methods were not run with the same seeds: diffusion_nft 0, 1; flow_grpo 0." in text


def test_nothing_is_missing_where_all_have_the_same_seeds(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=2)
    (study,) = load([tmp_path]).studies
    table = provenance.missing(study)
    assert (table.records, table.title) == ((), "first, shapes: no missing cell")
    assert table.notes == ("The methods of a comparison have the same seeds.",)


def test_the_commands_make_the_same_runs(tmp_path: Path) -> None:
    """Runs of composed configurations; each command, composed again, names their folders and settings."""
    plain = [("", method, reward, 0) for reward in ("geneval", "exact_scene") for method in ("dpo", "awm")]
    changed = [
        ("method.algorithm.safeguard=none", "sdpo", "exact_scene", 0),
        ("method.optimizer.lr=1e-05", "awm", "geneval", 2),
        ("method.optimizer.betas=[0.5,0.75]", "awm", "geneval", 2),
        ("overlay=none", "awm", "geneval", 2),
        ("evaluation.curve.steps=4", "awm", "geneval", 2),  # final.steps ends alike
        ("prompts.balance=count", "awm", "geneval", 2),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for override, method, reward, seed in [*plain, *changed]:
            chosen = ["experiment=reference", f"method={method}", f"reward={reward}", f"seed={seed}"]
            overrides = [*chosen, *([override] if override else [])]
            config = identity(compose("config", overrides))
            write_run(
                tmp_path, method, reward, seed, variant=variant(overrides), experiment="reference", config=config,
                until=0.0, grids=False,
            )  # fmt: skip
        (study,) = load([tmp_path]).studies
        table = provenance.commands(study)
        made = {}
        for row in table.records:
            python, dash, package, multirun, *words = shlex.split(row["command"])
            assert (python, dash, package, multirun) == ("python", "-m", "alignbench", "-m")
            choices = [word.split("=", 1) for word in words if word.startswith(("method=", "reward=", "seed="))]
            for each in itertools.product(*([f"{key}={one}" for one in value.split(",")] for key, value in choices)):
                overrides = [word for word in words if not word.startswith(("method=", "reward=", "seed="))]
                config = compose("config", [*overrides, *each])
                made[run_folder(config, overrides).relative_to("results").as_posix()] = identity(config)
    assert not any(row["not_in_the_command"] for row in table.records)
    assert set(made) == {run.name for run in study.runs}
    for run in study.runs:
        assert provenance.flatten(made[run.name]) == run.config
    assert [row["runs"] for row in table.records] == [4, *[1] * len(changed)]
    assert table.records[0]["command"] == (
        "python -m alignbench -m experiment=reference model=shapes method=awm,dpo reward=exact_scene,geneval seed=0"
    )


def test_as_few_commands_as_the_grid_allows(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=2)
    write_run(tmp_path, "srpo", "pickscore", 7, until=0.0, grids=False)
    (study,) = load([tmp_path]).studies
    assert [(row["command"].partition("model=")[2], row["runs"]) for row in provenance.commands(study).records] == [
        ("shapes method=diffusion_nft,flow_grpo reward=exact_scene,geneval seed=0,1", 8),
        ("shapes method=srpo reward=pickscore seed=7", 1),
    ]


def test_a_variant_whose_name_says_too_little_is_flagged(tmp_path: Path) -> None:
    write_run(tmp_path, variant="many_things_0123456789ab", experiment="default", until=0.0, grids=False)
    table = provenance.commands(load([tmp_path]).studies[0])
    (cell, _), (record,) = table.groups[0].rows[0].cells, table.records
    assert cell.flag
    assert "many_things_0123456789ab" in cell.detail
    assert record["not_in_the_command"] == "many_things_0123456789ab"
    assert record["command"] == "python -m alignbench -m model=shapes method=diffusion_nft reward=geneval seed=0"
