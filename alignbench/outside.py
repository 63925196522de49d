"""Files from outside: text and JSON read with limits, so that whatever is wrong with a file is one sentence.

Where it fits: every reader of a user's file opens it here. A file must be a regular one, so that a named pipe or a
device is refused instead of waited for. Text is UTF-8, with or without a byte-order mark; a line ends in LF or CRLF.
Gotchas: nothing else ends a line, so that U+2028 may stand in a prompt. Blank lines may end a file, not stand in it.
"""

import json
import math
import os
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from alignbench.errors import AlignbenchError, DataError

LARGEST_FILE = 256 * 2**20  # bytes
LONGEST_JSON = 2**20  # characters of one document: a line of a .jsonl file, or a file
DEEPEST = 32  # lists and objects in each other
LARGEST_INTEGER = 2**63 - 1

FAULTS: tuple[type[BaseException], ...] = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError, EOFError,
    SyntaxError, ImportError, AssertionError, struct.error, zlib.error,
)  # fmt: skip
"""What libraries raise while they read a damaged file: none of them promises less."""


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def foreign(where: str, expected: str, *more: type[BaseException]) -> Iterator[None]:
    """Turn whatever a library raises while it reads something into one sentence.

    Args:
        where: what is read.
        expected: what would have been right.
        more: errors of the library's own that are of no built-in kind.

    Raises:
        DataError: from what the library raised.
    """
    try:
        yield
    except AlignbenchError:
        raise
    except (*FAULTS, *more) as error:
        raise DataError(f"{where}: {expected} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, 300 characters at most; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, for reading.

    Raises:
        DataError: it cannot be opened or read, is no regular file, or is larger than ``LARGEST_FILE``.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise DataError(f"{path}: cannot be read: expected a regular file, not a pipe, socket or device")
            if about.st_size > LARGEST_FILE:
                raise DataError(f"{path}: has {about.st_size:,} bytes; files of up to {LARGEST_FILE:,} are read")
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r}: cannot be read ({error})") from error  # a null character in the name


def _at_once(name: str, flags: int) -> int:
    """Open without waiting for the writer of a pipe."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; see ``opened``."""
    with opened(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The content of a text file, without a byte-order mark.

    Raises:
        DataError: as ``opened``, or it is not UTF-8.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: cannot be read: not a text in UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def read_lines(path: Path, expected: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; blank ones at its end are left out.

    Args:
        expected: what every line holds, for the messages.

    Raises:
        DataError: as ``read_text``, the file has no line, or a line before the last is blank; it is named.
    """
    lines = read_text(path).rstrip().split("\n")
    if lines == [""]:
        raise DataError(f"{path}: is empty: expected {expected} per line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty; every line must hold {expected}, delete it")
        yield number, line.removesuffix("\r")


# ------------------------------------------------------------------------------------------------ JSON


def read_json(path: Path) -> Any:
    """The one document of a JSON file; see ``parse_json``."""
    return parse_json(read_text(path), str(path))


def read_json_lines(path: Path, expected: str) -> Iterator[tuple[int, Any]]:
    """The documents of a .jsonl file with the numbers of their lines; see ``read_lines`` and ``parse_json``."""
    for number, line in read_lines(path, expected):
        yield number, parse_json(line, f"{path}, line {number}")


def parse_json(text: str, where: str) -> Any:
    """A JSON document.

    Raises:
        DataError: invalid JSON, the same key twice in an object, NaN or infinity, an integer beyond 64 bits, half of a
            surrogate pair, more than ``DEEPEST`` levels, or more than ``LONGEST_JSON`` characters.
    """
    if len(text) > LONGEST_JSON:
        raise DataError(f"{where}: has {len(text):,} characters; JSON of up to {LONGEST_JSON:,} is read")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant
        )
        _check(value, DEEPEST)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg} at {at})") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply; {DEEPEST} levels are read") from error
    except ValueError as error:
        raise DataError(f"{where}: JSON that cannot be used: {error}") from error
    return value


def shown(value: object) -> str:
    """A value as JSON for a message, 80 characters at most."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(repeated)} stands twice in an object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > LARGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} characters; integers of 64 bits are read")
    return int(digits)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number; leave the key out, or use null")


def _check(value: object, levels: int) -> None:
    """Refuse what the parser lets through: more levels than allowed, and texts that UTF-8 cannot hold."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"half of a surrogate pair in the text {shown(value)}; write the character itself")
    elif isinstance(value, dict | list):
        if not levels:
            raise RecursionError
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(item, levels - 1)
