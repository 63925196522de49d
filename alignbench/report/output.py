"""The report's folder: whatever the report writes there it can later prove to be its own, and nothing else is touched.

files.txt lists what was written, with the SHA-256 of each file. The next report in the folder replaces and removes the
files that still are what the list says; anything else is a user's, and stays. A list names the files of two reports
while one takes the other's place, so that a report that was killed in the middle stays provable.
"""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from alignbench.errors import AlignbenchError
from alignbench.records import read_regular

LISTING = "files.txt"
HEAD = (
    "# Written by alignbench.report, with SHA-256: the next report in this folder replaces these files and no others."
)
OWN = re.compile(r"index\.html|figures/[^/\0]+\.(svg|png)|tables/[^/\0]+\.(csv|md|tex)")  # what a report writes
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
ELSEWHERE = "move it away, or give another folder: --output DIR"

Written = tuple[str, str]  # name below the folder, SHA-256


class ReportNotWritten(AlignbenchError):
    """The report's folder cannot be written, or what is in it would be lost."""


@dataclass
class Output:
    """Files of the report, gathered before any is written."""

    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, content: str | bytes) -> None:
        self.files[name] = content.encode(errors="replace") if isinstance(content, str) else content

    def write(self) -> None:
        """Write every file, the page last, and remove files of an earlier report that are no longer written.

        Raises:
            ReportNotWritten: the folder or a file in it cannot be written, or a file that the report did not write is
                in the way.
        """
        new = {(name, _hash(content)) for name, content in self.files.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in sorted({Path(name).parts[0] for name in self.files if "/" in name}):
                self._make(self.folder / part)
            earlier = self._earlier()
            for name in self.files:
                self._refuse_foreign(name, earlier | new)
            self._replace(LISTING, _listing(earlier | new))
            for name in sorted({name for name, _ in earlier} - set(self.files)):
                if is_own(self.folder, name, earlier):
                    (self.folder / name).unlink()
            for name, content in sorted(self.files.items(), key=lambda item: item[0] == "index.html"):
                self._replace(name, content)
            self._replace(LISTING, _listing(new))
        except OSError as error:
            raise ReportNotWritten(
                f"cannot write the report to {self.folder} ({error.strerror}: {error.filename}); "
                f"give a folder with free space that this user can write to: --output DIR"
            ) from error

    def _make(self, folder: Path) -> None:
        if folder.is_symlink():
            raise ReportNotWritten(f"{folder} is a link, which a report does not follow: {ELSEWHERE}")
        folder.mkdir(exist_ok=True)

    def _earlier(self) -> set[Written]:
        """What the list in the folder says; empty without one."""
        path = self.folder / LISTING
        if not os.path.lexists(path):
            return set()
        if _is_file(path):
            with contextlib.suppress(UnicodeDecodeError):
                head, *lines = read_regular(path).decode().split("\n")[:-1] or [""]
                found = [LINE.fullmatch(line) for line in lines]
                if head == HEAD and all(found):
                    return {(match[2], match[1]) for match in found if match and OWN.fullmatch(match[2])}
        raise ReportNotWritten(f"{path} is not the list of a report, or is damaged: {ELSEWHERE}")

    def _refuse_foreign(self, name: str, known: set[Written]) -> None:
        path = self.folder / name
        if os.path.lexists(path) and not is_own(self.folder, name, known):
            raise ReportNotWritten(f"{path} is not what a report wrote there: {ELSEWHERE}")

    def _replace(self, name: str, content: bytes) -> None:
        """Put a file in its place, whatever the place holds: a link is replaced, not followed."""
        path = self.folder / name
        temporary = path.with_name(f".{os.getpid()}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_own(folder: Path, name: str, written: Iterable[Written]) -> bool:
    """Whether a file is one that a report writes, reached without a link, and still what the list says."""
    path = folder / name
    if not OWN.fullmatch(name) or path.parent.is_symlink() or not _is_file(path):
        return False
    return (name, _hash(read_regular(path))) in written


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file and no link to one."""
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _listing(written: set[Written]) -> bytes:
    return "".join([f"{HEAD}\n", *(f"{digest}  {name}\n" for name, digest in sorted(written))]).encode()
