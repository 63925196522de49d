"""What a report may replace and remove in its folder, and what it leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alignbench.report import output
from alignbench.report.output import HEAD, Output, ReportNotWritten

PAGE = {"index.html": b"page", "tables/a.csv": b"a", "figures/a.svg": b"<svg/>"}
LATER = {"index.html": b"later", "tables/b.csv": b"b"}


def write(folder: Path, files: dict[str, bytes]) -> None:
    Output(folder, dict(files)).write()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_list_has_the_hash_of_every_file_as_sha256sum_checks_it(tmp_path: Path) -> None:
    write(tmp_path, PAGE)
    found = content(tmp_path)
    listing = found.pop("files.txt").decode()
    assert found == PAGE
    assert listing.startswith(f"{HEAD}\n")
    lines = listing.partition("\n")[2]
    checked = subprocess.run(["sha256sum", "-c", "-"], input=lines, text=True, capture_output=True, cwd=tmp_path)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in sorted(PAGE)]


def test_the_next_report_takes_the_place_of_the_last(tmp_path: Path) -> None:
    write(tmp_path, PAGE)
    write(tmp_path, LATER)
    found = content(tmp_path)
    assert found.pop("files.txt").count(b"\n") == 3
    assert found == LATER


def test_what_a_user_changed_since_stays(tmp_path: Path) -> None:
    write(tmp_path, PAGE)
    (tmp_path / "tables" / "a.csv").write_text("with my notes")
    (tmp_path / "tables" / "mine.csv").write_text("mine")
    write(tmp_path, LATER)
    assert (tmp_path / "tables" / "a.csv").read_text() == "with my notes"
    assert (tmp_path / "tables" / "mine.csv").read_text() == "mine"
    (tmp_path / "index.html").write_text("edited")
    with pytest.raises(ReportNotWritten, match=r"index\.html is not what a report wrote there: move it away, or give"):
        write(tmp_path, PAGE)
    assert (tmp_path / "index.html").read_text() == "edited"
    assert (tmp_path / "tables" / "b.csv").read_text() == "b"


@pytest.mark.parametrize("name", ["index.html", "tables/a.csv", "figures/a.svg"])
def test_a_users_file_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ReportNotWritten, match=f"{name} is not what a report wrote there"):
        write(tmp_path, PAGE)
    assert content(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize(
    "listing",
    [
        *(b"", b"thesis.tex\nindex.html\n", b"\xff\xfe\x00", b"\n" * 10, HEAD.encode()),
        *(f"{HEAD}\n{line}\n".encode() for line in ("thesis.tex", f"{'0' * 63}  index.html")),
    ],
)
def test_a_list_that_is_no_reports_removes_nothing(tmp_path: Path, listing: bytes) -> None:
    (tmp_path / "files.txt").write_bytes(listing)
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ReportNotWritten, match=r"files\.txt is not the list of a report, or is damaged: move it away"):
        write(tmp_path, PAGE)
    assert content(tmp_path) == {"files.txt": listing, "thesis.tex": b"years"}


def test_a_list_names_files_of_reports_alone(tmp_path: Path) -> None:
    """Even one with the right form and hashes: the kinds of files, and their places, are a report's."""
    root = tmp_path / "root"
    (root / "tables").mkdir(parents=True)
    mine = {name: root / name for name in ("thesis.tex", "../above.csv", "tables/../x.csv", "tables/notes.txt")}
    for path in mine.values():
        path.write_text("years")
    lines = [f"{output._hash(b'years')}  {name}\n" for name in mine]
    (root / "files.txt").write_text("".join([f"{HEAD}\n", *lines]))
    write(root, PAGE)
    assert [path.read_text() for path in mine.values()] == ["years"] * len(mine)


def test_links_are_not_followed(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "report"
    mine.mkdir()
    folder.mkdir()
    (mine / "a.csv").write_text("a")
    (folder / "tables").symlink_to(mine)
    with pytest.raises(ReportNotWritten, match="tables is a link, which a report does not follow"):
        write(folder, PAGE)
    (folder / "tables").unlink()
    write(folder, PAGE)
    for name in ("index.html", "files.txt"):
        (mine / name).write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(mine / name)
        with pytest.raises(ReportNotWritten, match=f"{name} is not"):
            write(folder, LATER)
        assert (mine / name).is_file()
        (folder / name).unlink()
        (folder / name).write_bytes((mine / name).read_bytes())
    write(folder, LATER)
    assert (mine / "a.csv").read_text() == "a"


@pytest.mark.parametrize("name", ["files.txt", "index.html"])
def test_a_pipe_in_the_way_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ReportNotWritten, match=f"{name} is not"):
        write(tmp_path, PAGE)


@pytest.mark.parametrize("calls", range(6))
def test_a_report_that_was_killed_can_still_prove_its_files(tmp_path: Path, calls: int) -> None:
    """Killed before each of its replacements; the next report finds everything to be its own."""
    write(tmp_path, PAGE)
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom alignbench.report.output import Output\n"
        "left, replace = int(sys.argv[2]), os.replace\n"
        "def counted(*paths):\n    global left\n    left -= 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if left < 0 else replace(*paths)\n"
        "os.replace = counted\n"
        f"Output(Path(sys.argv[1]), {LATER!r}).write()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(calls)], capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if calls < 4 else 0), done.stderr
    write(tmp_path, PAGE)
    assert {name: data for name, data in content(tmp_path).items() if not name.endswith((".tmp", "files.txt"))} == PAGE
