"""Records of any kind: the run is listed with what is wrong, the others are shown, and no exception leaves."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alignbench import status
from alignbench.errors import AlignbenchError
from alignbench.report import across, answer, claims, gallery, internals, matched, provenance, tables, verdict, within
from alignbench.report.data import Records, Unreadable, load
from alignbench.report.page import build
from tests.report.synthetic import write_run

FILES = ("run.json", "config.yaml", "status.json", "metrics.jsonl", "evaluations.jsonl")
HUGE = "9" * 400  # an integer that is no float
DEEP = "[" * 500 + "]" * 500
VALUES = [
    *(
        "1e999",
        HUGE,
        "-1e200",
        DEEP,
        "null",
        "true",
        '"text"',
        '"1"',
        "[]",
        "{}",
        "[[1]]",
        '{"a": {"b": []}}',
        "-1",
        "0.5",
    ),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[2J"', json.dumps("x" * 5000), json.dumps("=1+1")),
]


def tabulated(records: Records) -> list[str]:
    """Every table of the page, without its figures."""
    studies, protocols = records.studies, records.protocols
    opening = answer.answer(records)
    made = [
        *([opening.table] if opening else []),
        *(each.table for study in studies for each in verdict.verdicts(study, protocols)),
        *(across.pairs(study) for study in studies),
        *(across.methods(study) for study in studies if len(study.comparisons) > 1),
        *(table for study in studies for table in matched.matched(study, protocols)),
        within.table(records),
        claims.table(claims.findings(records, [])),
        *(table for study in studies for table in tables.headline(study, protocols)),
        *(table for study in studies for table in tables.efficiency(study, protocols)),
        *(table for study in studies for table in tables.geneval(study, protocols)),
        *(tables.cost(study) for study in studies),
        provenance.runs(records),
        *(provenance.missing(study) for study in studies),
        *(provenance.commands(study) for study in studies),
        provenance.protocols(records),
        *(provenance.differences(study) for study in studies),
        *(provenance.own_settings(study) for study in studies),
        provenance.environment(records),
    ]
    for table in made:
        assert len(f"{table.name}.csv".encode()) <= 255
    forms = (tables.markdown, tables.latex, lambda table: tables.csv(table.records))
    written = [form(table) for table in made for form in forms]
    return [text.encode().decode() for text in written]  # what cannot be written fails here


def problems(records: Records) -> str:
    return "\n".join(problem for run in (*records.runs, *records.unreadable) for problem in run.problems)


def shown(root: Path) -> None:
    """Status must say something of a folder, as text and as JSON in the strict sense."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text):
        assert status.main([str(root)]) == 0
    with contextlib.redirect_stdout(told):
        assert status.main([str(root), "--json"]) == 0
    assert "\x1b" not in text.getvalue()
    assert json.loads(told.getvalue(), parse_constant=refuse)["cells"]


def replaced(text: str, key: str, value: str) -> str:
    """A JSON text with another value, given as text, for a top-level key."""
    row = json.loads(text)
    marker = "@@@"
    return json.dumps(row | {key: marker}).replace(json.dumps(marker), value)


IMPOSSIBLE = ["1e999", HUGE, "-1e200", DEEP]  # for every field
OF_RUN = (
    "schema experiment model reward method variant seed protocol protocol_hash final_protocol targets normalisation "
    "budget git hardware processes kind"
)
OF_EVALUATIONS = (
    "fraction iteration protocol_hash weights guidance metrics standard_errors scores grid ledger volatile protocol"
)
KEYS = [
    *(("run.json", key) for key in OF_RUN.split()),
    *(("status.json", key) for key in ("status", "message", "fraction")),
    *(("metrics.jsonl", key) for key in ("iteration", "reward", "ledger", "volatile", "fraction")),
    *(("evaluations.jsonl", key) for key in OF_EVALUATIONS.split()),
]


def examined(root: Path, runs: int) -> Records:
    """The sound run of seed 0 is shown beside the others, each of which is shown or listed; no table fails."""
    records = load([root])
    assert len(records.runs) + len(records.unreadable) == runs
    (sound,) = (run for run in records.runs if run.name.endswith("/diffusion_nft/seed0"))
    assert sound.problems == ()
    tabulated(records)
    shown(root)
    with contextlib.suppress(AlignbenchError):
        internals.draw(records.runs, ["reward"])
    return records


@pytest.mark.parametrize(("file", "key"), KEYS)
def test_any_value_of_any_field(tmp_path: Path, file: str, key: str) -> None:
    """In the last row of a run each; what cannot be computed with is told, with the name of the file."""
    write_run(tmp_path, seed=0, until=0.2, grids=False)
    for seed, value in enumerate(VALUES, start=1):
        folder = write_run(tmp_path, seed=seed, until=0.2, grids=False)
        *before, last = (folder / file).read_text().splitlines()
        (folder / file).write_text("\n".join([*before, replaced(last, key, value)]) + "\n")
    records = examined(tmp_path, 1 + len(VALUES))
    told = {run.name.rpartition("seed")[2]: "; ".join(run.problems) for run in (*records.runs, *records.unreadable)}
    for value in IMPOSSIBLE:
        assert file in told[str(VALUES.index(value) + 1)], value


def test_a_missing_field(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, until=0.2, grids=False)
    for seed, (file, key) in enumerate(KEYS, start=1):
        folder = write_run(tmp_path, seed=seed, until=0.2, grids=False)
        rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        rows[-1].pop(key, None)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    examined(tmp_path, 1 + len(KEYS))


@pytest.mark.parametrize("file", FILES)
def test_any_file_of_another_kind(tmp_path: Path, file: str) -> None:
    contents = [
        b"",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"{",
        b'{"a": 1}',
        b"[" * 10_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
    ]
    write_run(tmp_path, seed=0, until=0.2, grids=False)
    for seed, content in enumerate(contents, start=1):
        folder = write_run(tmp_path, seed=seed, until=0.2, grids=False)
        (folder / file).write_bytes(content + b"\n")
    records = examined(tmp_path, 1 + len(contents))
    assert file in problems(records)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    """In a run each; both commands in processes of their own, which can be ended if they hang."""
    for seed, file in enumerate([*FILES, ".lock", "scores.json", "grid.png"]):
        folder = write_run(tmp_path, seed=seed, until=0.1)
        lines = (folder / "evaluations.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"scores": "scores.json", "grid": "grid.png"} for line in lines]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)
    (tmp_path / ".sweep" / "one").mkdir(parents=True)
    os.mkfifo(tmp_path / ".sweep" / "one" / "0.json")
    script = (
        "import sys, pathlib; from alignbench.report.data import load\n"
        "found = load([pathlib.Path(sys.argv[1])])\n"
        "print(*(run.problems for run in (*found.runs, *found.unreadable)))"
    )
    for command in (["-m", "alignbench.status"], ["-c", script]):
        told = subprocess.run([sys.executable, *command, tmp_path], capture_output=True, text=True, timeout=300)
        assert told.returncode == 0, told.stderr
        assert " ".join(told.stdout.split()).count("it is no regular file") >= 4
    (run, *_) = (run for run in load([tmp_path]).runs if run.seed == len(FILES) + 2)
    assert "grid.png cannot be read" in gallery.strip(run).missing[0]
    assert gallery.prompts(run.evaluations[0]) == ()


def test_a_run_that_lost_an_evaluation_has_no_final_score(tmp_path: Path) -> None:
    """Without its last row, an earlier one would stand as the final one."""
    folder = write_run(tmp_path, grids=False)
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    (folder / "evaluations.jsonl").write_text("\n".join([*lines[:-1], replaced(lines[-1], "guidance", '"3"')]) + "\n")
    (run,) = load([tmp_path]).runs
    assert (run.status, run.finished) == ("damaged", False)
    told = f"evaluations.jsonl: row {len(lines)} is left out (guidance is 3: it must be a number)"
    assert told in run.problems


def test_pictures_and_scores_outside_the_run_are_not_read(tmp_path: Path) -> None:
    picture, secret = tmp_path / "picture.png", tmp_path / "secret.json"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(picture)
    secret.write_text(json.dumps({"grid": [{"id": "p/0", "prompt": "my secret"}]}))
    folder = write_run(tmp_path / "results")
    for number, (grid, scores) in enumerate(
        [
            (str(picture), str(secret)),
            ("../../../../../picture.png", "../../../../../secret.json"),
            ("images/link.png", "link.json"),
        ]
    ):
        rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        rows[number] |= {"grid": str(grid), "scores": str(scores)}
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "images" / "link.png").symlink_to(picture)
    (folder / "link.json").symlink_to(secret)
    records = load([tmp_path / "results"])
    (run,) = records.runs
    assert [row.grid is None for row in run.evaluations[:4]] == [True, True, True, False]
    outside = [problem for problem in run.problems if "which lies outside the run's folder" in problem]
    assert len(outside) == 6
    assert outside[0] == f"evaluations.jsonl: row 1: grid is {str(picture)!r}, which lies outside the run's folder"
    page = build([tmp_path / "results"], tmp_path / "report", lambda _: None).read_text()
    assert gallery.embed(picture.read_bytes())[0] not in page
    assert "my secret" not in page
    assert "which lies outside the run&#39;s folder" in page


def png(change: Callable[[bytearray], None]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    change(data)
    return bytes(data)


def larger(data: bytearray) -> None:
    """A header that promises 100,000 x 100,000 pixels."""
    import zlib

    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")


def test_a_picture_that_promises_too_many_pixels(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    next(iter(sorted((folder / "images").iterdir()))).write_bytes(png(larger))
    (run,) = load([tmp_path]).runs
    assert len(gallery.strip(run).missing) == 1


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
@settings(deadline=None, max_examples=300)
def test_any_bytes_for_a_picture(changes: list[tuple[int, int]]) -> None:
    def change(data: bytearray) -> None:
        for place, value in changes:
            data[place % len(data)] = value

    with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        gallery.embed(png(change))


def test_long_and_hostile_names(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0)
    for number, name in enumerate(
        ["x" * 255, "é" * 100, "a\x1b[31mb\x07", "=cmd|' /C calc'!A0", "$x_1$ \\frac{", "a/b:c*?<>|", "\ud800"]
    ):
        folder = write_run(tmp_path, seed=number + 1)
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(
            json.dumps(run | {"method": name, "variant": "", "experiment": name, "reward": name})
        )
    folder = write_run(tmp_path, seed=20)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"method": "x" * 256}))
    said: list[str] = []
    build([tmp_path], tmp_path / "report", said.append)
    records = load([tmp_path])
    assert len(records.runs) == 8
    assert isinstance(records.unreadable[0], Unreadable)
    assert "it must be a name of 1 to 255 bytes" in records.unreadable[0].problems[0]
    assert "\x1b" not in "".join(said)
    assert "'=cmd|" in (tmp_path / "report" / "tables" / "evaluations.csv").read_text()


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"), ("+cmd|x", "'+cmd|x"), ("-1+1", "'-1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("-", "'-"),
        ("-0.5", "-0.5"), ("+1e-4", "+1e-4"), ("a=1", "a=1"), (-0.5, "-0.5"), (None, ""), ("", ""),
    ],
)  # fmt: skip
def test_no_cell_is_computed_by_a_spreadsheet(value: object, cell: str) -> None:
    text = tables.csv([{"name": "x", "value": value}])
    assert text == f"name,value\nx,{cell}\n"
    assert tables.csv([{"=1+1": 1}]) == "'=1+1\n1\n"


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 1e308, -1, 0, 1])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=10),
    lambda node: st.lists(node, max_size=4) | st.dictionaries(st.text(max_size=6), node, max_size=4),
    max_leaves=12,
)  # fmt: skip


CHANGE = st.tuples(
    st.sampled_from(["run.json", "status.json", "metrics.jsonl", "evaluations.jsonl"]),
    st.integers(0, 3),  # of the rows
    st.dictionaries(st.sampled_from(sorted({key for _, key in KEYS})), JSON, min_size=1, max_size=3),
    st.booleans(),  # one level down, where there is a mapping
)


@given(st.lists(CHANGE, min_size=8, max_size=8))
@settings(deadline=None, max_examples=15)
def test_any_json_in_the_records(tmp_path_factory: pytest.TempPathFactory, changes: list[Any]) -> None:
    """Eight damaged runs an example."""
    root = tmp_path_factory.mktemp("fuzzed")
    write_run(root, seed=0, until=0.2, grids=False)
    for seed, (file, row, values, inside) in enumerate(changes, start=1):
        folder = write_run(root, seed=seed, until=0.2, grids=False)
        rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
        place = rows[row % len(rows)]
        if inside:
            place = next((value for value in place.values() if isinstance(value, dict) and value), place)
            values = dict(zip([*place, *values], values.values(), strict=False))
        place |= values
        (folder / file).write_text("".join(json.dumps(each) + "\n" for each in rows))
    examined(root, 1 + len(changes))
