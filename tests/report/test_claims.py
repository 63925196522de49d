import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignbench.report import claims
from alignbench.report.claims import BadClaims, Finding, judge
from alignbench.report.data import load
from alignbench.report.statistics import Interval
from tests.report.synthetic import BUDGET, write_comparison, write_run

SPEED = {"quantity": "speed_up", "method": "diffusion_nft", "against": "flow_grpo", "rewards": ["geneval"]}
GAIN = {"quantity": "gain", "method": "flow_grpo", "metric": "geneval", "rewards": ["geneval"]}
DIFFERENCE = {"quantity": "difference", "method": "diffusion_nft", "against": "flow_grpo", "metric": "geneval"}


def entry(measure: dict[str, Any] | None = None, supported: dict[str, float] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"claim": "c", "published": "25", "where": "w", "not_comparable": "n"}
    return found if measure is None else found | {"measure": measure, "supported": supported or {"above": 0}}


def found(root: Path, results: Path, *entries: dict[str, Any]) -> list[Finding]:
    folder = root / "claims"
    folder.mkdir(exist_ok=True)
    (folder / "one.yaml").write_text(yaml.safe_dump({"paper": "p", "source": "s", "claims": list(entries)}))
    return claims.findings(load([results]), claims.read(folder))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    write_comparison(root)
    return root


@pytest.mark.parametrize(
    ("low", "high", "bound", "above", "below"),
    [
        (1.5, 3.0, "", "supported", "contradicted"),
        (0.2, 0.8, "", "contradicted", "supported"),
        (0.8, 1.2, "", "inconclusive", "inconclusive"),
        (1.0, 3.0, "", "inconclusive", "inconclusive"),  # the number itself is not beyond it
        (math.nan, math.nan, "", "inconclusive", "inconclusive"),  # one run
        (1.5, 1.5, "", "inconclusive", "inconclusive"),  # identical runs
        (1.5, 3.0, "≥", "supported", "contradicted"),
        (0.2, 0.8, "≥", "inconclusive", "inconclusive"),  # the truth may be larger
        (0.2, 0.8, "≤", "contradicted", "supported"),
        (1.5, 3.0, "≤", "inconclusive", "inconclusive"),  # the truth may be smaller
    ],
)
def test_the_ruling_of_an_interval(low: float, high: float, bound: str, above: str, below: str) -> None:
    interval = Interval((low + high) / 2, low, high, 3)
    assert (judge(interval, 1.0, True, bound), judge(interval, 1.0, False, bound)) == (above, below)


def test_records_decide_the_verdict(tmp_path: Path) -> None:
    """The same claim on runs whose final scores are moved: supported, contradicted and inconclusive."""
    write_comparison(tmp_path / "results", methods=("flow_grpo",))
    rulings = {}
    for name, gains in {"up": (0.1, 0.11, 0.12), "down": (-0.1, -0.11, -0.12), "open": (-0.1, 0.0, 0.1)}.items():
        for seed, gain in enumerate(gains):
            path = tmp_path / f"results/first/shapes/geneval/flow_grpo/seed{seed}/evaluations.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                row["metrics"]["geneval"] = 0.3 + gain * row["fraction"]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (finding,) = found(tmp_path, tmp_path / "results", entry(GAIN))
        assert finding.interval is not None
        assert finding.interval.mean == pytest.approx(sum(gains) / 3)
        rulings[name] = finding.ruling
    assert rulings == {"up": "supported", "down": "contradicted", "open": "inconclusive"}


def test_every_quantity_by_hand(compared: Path, tmp_path: Path) -> None:
    training = {"quantity": "training", "method": "flow_grpo", "metric": "reward", "rewards": ["geneval"]}
    area = DIFFERENCE | {"quantity": "area"}
    gain, difference, curve, late = found(
        tmp_path, compared,
        entry(GAIN),
        entry(DIFFERENCE | {"rewards": ["geneval"]}, {"below": 0}),
        entry(area | {"rewards": ["geneval"]}),
        entry(training, {"above": 0.3}),
    )  # fmt: skip
    assert gain.interval
    assert difference.interval
    assert curve.interval
    assert late.interval
    assert gain.interval.mean == pytest.approx(0.10)
    half = 4.3026527297 * 0.01 / math.sqrt(3)
    assert gain.interval.half_width == pytest.approx(half)
    assert gain.ruling == "supported"
    assert difference.interval.mean == pytest.approx(0.15)
    assert difference.interval.half_width == pytest.approx(2.776445105 * 0.01 * math.sqrt(2 / 3))  # Welch, 4 degrees
    assert difference.ruling == "contradicted"
    assert curve.interval.mean == pytest.approx(0.075)
    assert late.interval.mean == pytest.approx(0.4)
    assert late.ruling == "inconclusive"  # no spread at all is no evidence
    assert gain.measured == "GenEval (official), final minus base: +0.100 [+0.075, +0.125]"
    assert gain.setting == "first, shapes, trained on geneval"


def test_a_speed_up_and_its_censoring(compared: Path, tmp_path: Path) -> None:
    (speed,) = found(tmp_path, compared, entry(SPEED, {"above": 1}))
    assert speed.ruling == "supported"
    assert speed.measured.endswith("; GenEval (official) ≥ 0.45 reached by 3/3 and 0/3 runs")
    assert "speed-up in the budget's cost ≥ 1.5" in speed.measured
    reverse = SPEED | {"method": "flow_grpo", "against": "diffusion_nft"}
    assert found(tmp_path, compared, entry(reverse, {"above": 1}))[0].ruling == "contradicted"
    exact = found(tmp_path, compared, entry(SPEED | {"rewards": ["exact_scene"]}, {"above": 1}))[0]
    assert (exact.ruling, exact.measured.endswith("no ratio")) == ("inconclusive", True)


def test_a_speed_up_along_another_cost(compared: Path, tmp_path: Path) -> None:
    (steps,) = found(tmp_path, compared, entry(SPEED | {"axis": "optimizer_steps"}, {"above": 1}))
    # 200 steps against 400 at the whole budget: both within the 200 that the first could spend, the other misses
    assert steps.interval is not None
    assert steps.interval.mean == pytest.approx(200 / (200 * 1.9 / 3), rel=0.06)
    assert steps.measured.startswith("speed-up in optimizer steps ≥")


def test_without_a_reward_every_comparison_answers(compared: Path, tmp_path: Path) -> None:
    settings = [finding.setting for finding in found(tmp_path, compared, entry(DIFFERENCE))]
    assert settings == ["first, shapes, trained on exact_scene", "first, shapes, trained on geneval"]


def test_not_run_and_not_comparable(compared: Path, tmp_path: Path) -> None:
    other = entry(GAIN | {"method": "srpo"})
    assert [each.ruling for each in found(tmp_path, compared, other, entry())] == ["not run", "not comparable"]


def test_unfinished_runs_and_variants_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path / "results", "flow_grpo", status="failed", until=0.5, grids=False)
    for seed in range(3):
        write_run(tmp_path / "results", "flow_grpo", seed=seed, variant="kl=1", grids=False)
    assert [each.ruling for each in found(tmp_path, tmp_path / "results", entry(GAIN))] == ["not run"]


def test_one_run_decides_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "results", "flow_grpo", grids=False)
    (finding,) = found(tmp_path, tmp_path / "results", entry(GAIN))
    assert finding.ruling == "inconclusive"
    assert claims.table([finding]).groups[0].rows[0].cells[4].detail == "one run has no interval"


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"budget": {"flops": BUDGET / 2}}, "the runs had different budgets"),
        ({"final_protocol_hash": "0ther"}, "the runs were evaluated under different protocols"),
    ],
)
def test_what_is_not_matched_is_inconclusive(tmp_path: Path, changes: dict[str, Any], measured: str) -> None:
    for seed in range(3):
        write_run(tmp_path / "results", "diffusion_nft", seed=seed, grids=False)
        write_run(tmp_path / "results", "flow_grpo", seed=seed, run=changes, grids=False)
    (finding,) = found(tmp_path, tmp_path / "results", entry(DIFFERENCE))
    assert (finding.ruling, finding.measured) == ("inconclusive", measured)


def test_a_metric_that_nobody_measured_is_inconclusive(compared: Path, tmp_path: Path) -> None:
    for measure in (GAIN | {"metric": "hps"}, DIFFERENCE | {"metric": "hps"}, GAIN | {"quantity": "training"}):
        finding = found(tmp_path, compared, entry(measure))[0]
        assert finding.ruling == "inconclusive"
        assert "not measured" in finding.measured


def test_untuned_methods_are_named(tmp_path: Path) -> None:
    for seed in range(2):
        config = {"method": {"name": "flow_grpo", "tuned": False}}
        write_run(tmp_path / "results", "flow_grpo", seed=seed, config=config, grids=False)
    (finding,) = found(tmp_path, tmp_path / "results", entry(GAIN))
    assert finding.setting.endswith("untuned: flow_grpo")


def test_the_table_says_what_would_support_a_claim(compared: Path, tmp_path: Path) -> None:
    table = claims.table(found(tmp_path, compared, entry(GAIN), entry()))
    rows = [[cell.text for cell in row.cells] for row in table.groups[0].rows]
    assert [row[3] for row in rows] == ["above 0", "–"]
    assert [row[4] for row in rows] == ["supported", "not comparable"]
    assert table.groups[0].title == "p (s)"
    assert table.groups[0].rows[0].cells[4].detail == "n = 3, a preview"
    assert table.records[0]["verdict"] == "supported"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (entry(GAIN | {"quantity": "speed"}), "quantity 'speed' is none of"),
        (entry(GAIN | {"against": "dpo"}), "gain takes no 'against'"),
        (entry(SPEED | {"against": ""}), "speed_up needs 'against'"),
        (entry(SPEED | {"metric": "geneval"}), "speed_up takes no 'metric'"),
        (entry({"quantity": "gain", "method": "a"}), "gain needs a 'metric'"),
        (entry(SPEED | {"axis": "hours"}), "axis 'hours' is none of"),
        (entry(GAIN, {"over": 1.0}), "supported takes above or below"),
        (entry(GAIN | {"methods": "a"}), "methods"),
        (entry() | {"verdict": "supported"}, r"unknown keys \['verdict'\]"),
        ({"claim": "c"}, "published"),
    ],
)
def test_a_malformed_claim_is_refused(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"paper": "p", "source": "s", "claims": [broken]}))
    with pytest.raises(BadClaims, match=message):
        claims.read(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadClaims, match="one YAML file a paper"):
        claims.read(tmp_path)


def test_the_committed_claims_name_five_papers_and_what_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    committed = claims.read(root / "experiments" / "claims")
    assert len({claim.source for claim in committed}) == 5
    methods = {path.stem for path in (root / "conf" / "method").glob("*.yaml")}
    for claim in committed:
        assert claim.not_comparable
        if claim.measure:
            assert {claim.measure.method, claim.measure.against or claim.measure.method} <= methods
