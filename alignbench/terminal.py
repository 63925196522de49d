"""What commands print passes through here, so that a terminal which is closed, full or plain ends nothing.

* What cannot be written (a closed pipe, a full device, a terminal that is gone) is lost, and the command goes on.
* What the encoding lacks is written plainly: a minus sign as ``-``, anything unknown as ``?``.
* Control characters of names, messages and prompts do not reach the terminal; colours and progress bars do.
"""

import codecs
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

PLAINLY = {
    "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MULTIPLICATION SIGN}": "x",
    "\N{PLUS-MINUS SIGN}": "+/-", "\N{GREATER-THAN OR EQUAL TO}": ">=", "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"', "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{HORIZONTAL ELLIPSIS}": ".",
}  # fmt: skip
COLOUR = r"\x1b\[[0-9;]*m"
CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
NOT_OURS = re.compile(rf"({COLOUR}|\r)|{CONTROL.pattern}")  # the group stays: what rich and tqdm write


def printable(text: str) -> str:
    """A name or message without control characters other than line breaks and tabs, colours included."""
    return CONTROL.sub("", text)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Codecs' error handler: what stands for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAINLY.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("alignbench.plainly", _plainly)


class _Descriptor(io.FileIO):
    """A file descriptor whose writes never fail; ``lost`` is why the first that was lost could not be written."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


class Lasting(io.TextIOWrapper):
    """A text stream on the descriptor of another, for as long as that one."""

    def __init__(self, stream: TextIO) -> None:
        self.descriptor = _Descriptor(stream.fileno(), "w", closefd=False)
        super().__init__(
            io.BufferedWriter(self.descriptor),
            encoding=stream.encoding,
            errors="alignbench.plainly",
            line_buffering=stream.isatty() or stream is sys.stderr,
        )

    def write(self, text: str) -> int:
        super().write(NOT_OURS.sub(lambda found: found[1] or "", text))
        return len(text)


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, whatever is printed goes to streams that never fail. Usable as a decorator; a second one changes nothing.

    Streams without a descriptor (a notebook's, a test's) stay as they are; one that was closed before is replaced.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None or stream.closed:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, Lasting):
        return stream
    try:
        stream.flush()
        return Lasting(stream)
    except OSError:  # no descriptor behind it (io.UnsupportedOperation)
        return stream


def unwritten() -> str | None:
    """Why some of the standard output was lost; None if nothing was, or if its reader has simply gone (``| head``)."""
    sys.stdout.flush()
    lost = sys.stdout.descriptor.lost if isinstance(sys.stdout, Lasting) else None
    return None if lost is None or lost.errno == errno.EPIPE else os.strerror(lost.errno or 0)
