import base64
import hashlib
import itertools
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml

from alignbench.report.__main__ import main
from alignbench.report.data import AXES
from alignbench.report.page import build
from tests.report.synthetic import HASHES, write_run

ATTACK = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Elements, and what a reader without images or a mouse needs of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for method in ("diffusion_nft", "flow_grpo"):
        for seed in range(2):
            write_run(root, method, "geneval", seed, grids=seed == 0)
    write_run(
        root, "flow_grpo", "geneval", 8, variant=f"a={ATTACK}", status="failed", message=f"died of {ATTACK}", until=0.3,
        config={"note": ATTACK}, run={"git": {"commit": ATTACK, "dirty": True}},
    )  # fmt: skip
    said: list[str] = []
    page = build([root], root / "report", said.append)
    assert said[-1].startswith(f"report: {page}")
    return root / "report"


def test_every_figure_and_table_is_a_file(report: Path) -> None:
    for metric in ("reward", "geneval", "exact_scene"):
        for axis in AXES:
            for kind in ("svg", "png"):
                assert (report / f"figures/curve_first_shapes_geneval_{metric}_{axis.key}.{kind}").stat().st_size > 1000
    tables = {path.name.split("_")[0].split(".")[0] for path in (report / "tables").iterdir()}
    assert {"headline", "geneval", "efficiency", "cost", "runs", "protocols", "differences", "settings"} <= tables
    assert {"environment", "evaluations", "curves", "hacking", "verdict", "pairs", "matched", "within"} <= tables
    kinds = {kind: {path.stem for path in (report / "tables").glob(f"*.{kind}")} for kind in ("csv", "md", "tex")}
    assert kinds["md"] == kinds["tex"] == kinds["csv"] - {"evaluations", "curves", "hacking"}
    assert sorted(line.split("  ")[1] for line in (report / "files.txt").read_text().splitlines()[1:]) == sorted(
        path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file() and path.name != "files.txt"
    )


def test_every_table_and_figure_on_the_page_names_its_file(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Page(text)
    named = [unescape(name) for name in re.findall(r'<code class="file">((?:tables|figures)/[^<]*)</code>', text)]
    assert all((report / name).is_file() for name in named)
    assert len([name for name in named if name.startswith("tables/")]) == len(page.all("table"))
    drawn = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len([name for name in named if name.startswith("figures/")]) == len(drawn)
    assert len(named) == len(set(named))
    assert "tables/missing_first_shapes.csv" in named
    assert "figures/headline.svg" in named
    grids = [unescape(name) for name in re.findall(r'<code class="file">([^<]*/images)</code>', text)]
    assert grids
    assert all((report.parent / name).is_dir() for name in grids)


LARGEST = 15_000_000  # bytes that a mail or a repository still takes


def test_the_page_stays_small(report: Path) -> None:
    assert (report / "index.html").stat().st_size < LARGEST


@pytest.mark.soak
def test_the_page_of_500_runs_stays_small(tmp_path: Path) -> None:
    for reward, method, seed in itertools.product(("geneval", "exact_scene"), range(25), range(10)):
        write_run(tmp_path / "results", f"method_{method:02}", reward, seed, grids=seed == 0)
    said: list[str] = []
    page = build([tmp_path / "results"], tmp_path / "report", said.append)
    assert said[0].startswith("read 500 runs")
    assert page.stat().st_size < LARGEST


def test_names_and_messages_are_escaped(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert ATTACK not in text
    assert "died of &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert text.count("<script>") == 3  # plotly.js and the page's own two
    for path in report.rglob("*.md"):
        assert "<script>" not in path.read_text()


def test_the_page_needs_nothing_from_outside(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Page(text)
    (policy,) = (each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith(
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", style)


def test_only_the_scripts_of_the_page_may_run(report: Path) -> None:
    text = (report / "index.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"sha256-(.*?)'", unescape(text[: text.index("<style>")])) == hashes


def test_every_figure_has_a_text_alternative(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    images = page.all("img")
    assert images
    assert all(attributes["alt"] for attributes in images)
    figures = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    charts = [str(attributes["aria-label"]) for attributes in figures if "data-axis" in attributes]
    assert len(charts) == 3 * len(AXES)
    assert all("Line chart" in text for text in charts)
    paths = [str(attributes["aria-label"]) for attributes in figures if "data-axis" not in attributes]
    assert len(paths) == 1 + 5  # the opening; exact scene, PickScore, second judge, diversity, drift
    assert "Line chart of GenEval (official)" in paths[0]
    assert all("trained reward from" in text for text in paths[1:])
    assert all(attributes.get("aria-hidden") == "true" for attributes in page.all("svg"))


def test_one_axis_is_shown_and_the_switch_offers_all(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    choices = [attributes for attributes in page.all("input") if attributes.get("name") == "axis"]
    assert [choice["value"] for choice in choices] == [axis.key for axis in AXES]
    assert [choice["value"] for choice in choices if "checked" in choice] == ["flops"]
    shown = {str(a["data-axis"]) for _, a in page.elements if "data-axis" in a and "hidden" not in a}
    assert shown == {"flops"}


def test_the_switch_of_the_axis_needs_no_script(report: Path) -> None:
    text = (report / "index.html").read_text()
    style = re.search("<style>(.*?)</style>", text, re.S)
    assert style
    for axis in AXES:
        assert f'#curves:has(input[value="{axis.key}"]:checked) [data-axis="{axis.key}"] {{ display: block' in style[1]
    page = Page(text)
    kinds = {attributes["type"] for attributes in page.all("input") if attributes.get("name") == "axis"}
    assert kinds == {"radio"}  # reached and moved by keys
    assert not any(attributes.get("tabindex") == "-1" for _, attributes in page.elements)


def test_the_gallery_has_a_slider_over_what_was_recorded(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    sliders = [attributes for attributes in page.all("input") if attributes.get("type") == "range"]
    assert len(sliders) == 1
    used = [int(str(attributes["data-used"])) for attributes in page.all("figure") if "data-used" in attributes]
    assert {0, 100} <= set(used) <= set(range(101))
    beside = [attributes for attributes in page.all("figure") if attributes.get("class") != "plot"]
    assert len(used) < len(beside)  # grids at another guidance stand beside training


def test_sections_come_in_order_and_the_verdict_in_words(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == ["answer", "verdict", "curves", "geneval", "hacking", "samples", "cost", "provenance"]
    assert "Trained on geneval: diffusion_nft" in (report / "index.html").read_text()


def test_claims_are_a_section_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "results", status="running", until=0.0, grids=False)
    (tmp_path / "claims").mkdir()
    entry = {"claim": ATTACK, "published": "2 times", "where": ATTACK, "not_comparable": ATTACK}
    content = {"paper": ATTACK, "source": "s", "claims": [entry]}
    (tmp_path / "claims" / "one.yaml").write_text(yaml.safe_dump(content))
    arguments = [str(tmp_path / "results"), "--output", str(tmp_path / "report"), "--claims", str(tmp_path / "claims")]
    assert main(arguments) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert '<section id="claims"' in text
    assert "not comparable" in text
    assert ATTACK not in text
    assert ATTACK not in (tmp_path / "report/tables/claims.md").read_text()


def test_the_claims_of_the_working_folder_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "results", status="running", until=0.0, grids=False)
    monkeypatch.chdir(tmp_path)
    assert main(["results", "--output", "without"]) == 0
    (tmp_path / "experiments" / "claims").mkdir(parents=True)
    assert main(["results", "--output", "with"]) == 1  # an empty folder of claims is an error, not nothing
    entry = {"claim": "c", "published": "p", "where": "w", "not_comparable": "n"}
    content = {"paper": "p", "source": "s", "claims": [entry]}
    (tmp_path / "experiments" / "claims" / "one.yaml").write_text(yaml.safe_dump(content))
    assert main(["results", "--output", "with"]) == 0
    assert not (tmp_path / "without/tables/claims.csv").exists()
    assert (tmp_path / "with/tables/claims.csv").exists()


def test_ids_are_unique_and_links_lead_somewhere(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {str(attributes["href"])[1:] for attributes in page.all("a")}
    assert targets <= set(ids)


def test_plotted_means_are_in_the_csv(report: Path) -> None:
    frame = pd.read_csv(report / "tables/curves.csv")
    end = frame.query("metric == 'geneval' and axis == 'nfe' and method == 'diffusion_nft'").iloc[-1]
    assert (end["cost"], end["n"]) == (240_000, 2)
    assert end["mean"] == pytest.approx(0.30 + 0.245)  # seeds 0 and 1: gains 0.24 and 0.25
    base = frame.query("metric == 'geneval' and axis == 'nfe' and method.str.startswith('base')")
    assert base["method"].tolist() == ["base, guidance 1", "base, guidance 3"]
    assert base["protocol_hash"].tolist() == [HASHES["curve"], HASHES["final"]]
    assert base["mean"].tolist() == pytest.approx([0.30, 0.45])
    assert base["cost"].isna().all()  # the line holds at every cost
    evaluations = pd.read_csv(report / "tables/evaluations.csv")
    assert evaluations.groupby("run").size().max() == 20


def test_the_figure_of_the_opening_is_in_the_csv_even_where_no_other_shows_its_metric(tmp_path: Path) -> None:
    for seed in range(2):
        folder = write_run(tmp_path, reward="pickscore", seed=seed, grids=False, run={"targets": {"pickscore": 21.2}})
        for name in ("geneval", "exact_scene"):
            text = (folder / "evaluations.jsonl").read_text()
            (folder / "evaluations.jsonl").write_text(text.replace(f'"{name}": ', f'"other_{name}": '))
    build([tmp_path], tmp_path / "report", lambda _: None)
    frame = pd.read_csv(tmp_path / "report/tables/curves.csv")
    shown = frame.query("metric == 'pickscore'")
    assert set(shown["axis"]) == {"flops"}
    assert shown.query("method == 'diffusion_nft'")["mean"].iloc[-1] == pytest.approx(21.4)


def test_the_same_records_give_the_same_files(report: Path, tmp_path: Path) -> None:
    build([report.parent], tmp_path, lambda _: None)
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (report, tmp_path))
    assert one == two


def test_files_of_an_earlier_report_do_not_stay_and_others_do(tmp_path: Path) -> None:
    output = tmp_path / "report"
    write_run(tmp_path / "old", experiment="old", status="running", until=0.1, grids=False)
    build([tmp_path / "old"], output, lambda _: None)
    (output / "figures" / "mine.png").write_bytes(b"mine")
    write_run(tmp_path / "new", experiment="new", status="running", until=0.0, grids=False)
    build([tmp_path / "new"], output, lambda _: None)
    assert [path.name for path in (output / "figures").iterdir()] == ["mine.png"]
    assert not list((output / "tables").glob("*old*"))


def test_runs_without_a_single_evaluation_still_make_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path, status="failed", message="no prompts", until=0.0, grids=False)
    (folder / "evaluations.jsonl").unlink()
    (folder / "metrics.jsonl").unlink()
    page = build([tmp_path], tmp_path / "report", lambda _: None)
    assert "no prompts" in page.read_text()


def test_seconds_are_not_drawn_over_different_hardware(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, grids=False)
    write_run(tmp_path, seed=1, grids=False, run={"processes": 2})
    page = build([tmp_path], tmp_path / "report", lambda _: None)
    assert not list((tmp_path / "report/figures").glob("*_seconds*"))
    assert "No figure in seconds" in page.read_text()


def test_exit_status_and_message_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "report")]) == 1
    assert f"error: no run found below {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_exit_status_and_message_for_an_output_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "results", status="running", until=0.0, grids=False)
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "results"), "--output", str(tmp_path / "file" / "report")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: cannot write the report to {tmp_path / 'file' / 'report'}")
    assert "--output" in message


def test_progress_ends_on_the_path_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "results", status="running", until=0.0, grids=False)
    assert main([str(tmp_path / "results"), "--output", str(tmp_path / "report")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"read 1 run below {tmp_path / 'results'}"
    assert lines[-1].startswith(f"report: {tmp_path / 'report' / 'index.html'} (")


def test_importing_the_report_imports_no_torch_and_only_records_of_the_package() -> None:
    code = "import sys, alignbench.report.page, alignbench.report.__main__; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "hydra"} & set(modules)
    own = {name for name in modules if name.startswith("alignbench.") and not name.startswith("alignbench.report")}
    assert own == {f"alignbench.{name}" for name in ("errors", "record_fields", "records", "terminal")}
