"""Text and JSON from outside: what is tolerated, and what is refused in one sentence, at once."""

import json
import os
import time
from pathlib import Path

import pytest

from alignbench import outside
from alignbench.errors import DataError
from alignbench.outside import foreign, parse_json, read_bytes, read_json, read_lines, read_text


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb\n\n \n", ["a", "b"]),
        ("a\u2028b\u0085c\x0cd\n".encode(), ["a\u2028b\u0085c\x0cd"]),
        (b" a \n\tb", [" a ", "\tb"]),
    ],
)
def test_lines(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "f").write_bytes(content)
    assert list(read_lines(tmp_path / "f", "a letter")) == list(enumerate(lines, start=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "f: is empty: expected a letter per line"),
        (b"\n \r\n", "f: is empty: expected a letter per line"),
        (b"a\n\nb\n", "f, line 2: empty; every line must hold a letter, delete it"),
        (b"a\nb\xff\n", "f, line 2: cannot be read: not a text in UTF-8 (invalid start byte); save the file as UTF-8"),
        ("a\nb".encode("utf-16"), "f, line 1: cannot be read: not a text in UTF-8"),
        (b"a\n\xed\xa0\x80", "f, line 2: cannot be read: not a text in UTF-8"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError) as raised:
        list(read_lines(tmp_path / "f", "a letter"))
    assert message in str(raised.value)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    started = time.monotonic()
    for path, reason in (
        (tmp_path / "pipe", "expected a regular file, not a pipe, socket or device"),
        (tmp_path / "link", "expected a regular file, not a pipe, socket or device"),
        (Path("/dev/zero"), "expected a regular file, not a pipe, socket or device"),
        (tmp_path, "Is a directory"),
        (tmp_path / "nothing", "No such file or directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(DataError, match=r"cannot be read") as raised:
            read_text(path)
        assert reason in str(raised.value)
    assert time.monotonic() - started < 1


def test_a_pipe_with_a_writer_is_no_file_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "pipe", "r+b", buffering=0), pytest.raises(DataError, match="not a pipe"):
        read_bytes(tmp_path / "pipe")


def test_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(outside.LARGEST_FILE + 1)  # no byte of it is written
    with pytest.raises(DataError, match="f: has 268,435,457 bytes; files of up to 268,435,456 are read"):
        read_bytes(tmp_path / "f")
    monkeypatch.setattr(outside, "LONGEST_JSON", 5)
    assert parse_json("[1,2]", "x") == [1, 2]
    with pytest.raises(DataError, match="x: has 6 characters; JSON of up to 5 is read"):
        parse_json("[1, 2]", "x")


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "ü\u2028😀"], "b": {}},
        2**63 - 1,
        -(2**63) + 1,
        1e308,
        [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]],
    ],
)
def test_json_that_is_read(tmp_path: Path, value: object) -> None:
    for ascii_only in (True, False):
        (tmp_path / "f").write_text("\ufeff" + json.dumps(value, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
        assert read_json(tmp_path / "f") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON (Expecting value at column 1)"),
        ('{"a":\n 1,}', "at line 2, column"),
        ("{} {}", "not valid JSON (Extra data at column 4)"),
        ("'a'", "not valid JSON"),
        ("[" * 100_000, "nested too deeply; 32 levels are read"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested too deeply; 32 levels are read"),
        ("[" * 33 + "]" * 33, "nested too deeply; 32 levels are read"),
        ('["\\udfff"]', 'half of a surrogate pair in the text "\\udfff"'),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ("9" * 5_000, "an integer of 5000 characters; integers of 64 bits are read"),
        (str(2**63), "an integer of 19 characters"),
        ("1e400", "the number 1e400 is too large"),
        ('{"a": NaN}', "NaN is no number; leave the key out, or use null"),
        ("[-Infinity]", "-Infinity is no number"),
        ('{"a": 1, "b": 2, "a": 3}', 'the key "a" stands twice in an object'),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_json(text, "f, line 3")
    assert str(raised.value).startswith("f, line 3: ")
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300


def test_the_largest_json_takes_seconds_at_most() -> None:
    started = time.monotonic()
    parse_json("[" + "{}," * (2**20 // 3 - 2) + "{}]", "x")
    keys = ",".join(f'"{number:06d}":1' for number in range(90_000))
    with pytest.raises(DataError, match='the key "089999" stands twice'):
        parse_json("{" + keys + ',"089999":1}', "x")
    assert time.monotonic() - started < 20


def test_what_a_library_raises_is_one_sentence() -> None:
    for error, told in (
        (KeyError("a"), "'a'"), (RecursionError("deep\nly"), "deep"), (OSError(5, "bad"), "[Errno 5] bad"),
        (MemoryError(), "MemoryError"), (AssertionError(), "AssertionError"), (SyntaxError("broken PNG"), "broken PNG"),
    ):  # fmt: skip
        with pytest.raises(DataError) as raised, foreign("f.bin", "expected a file of ours"):
            raise error
        assert str(raised.value) == f"f.bin: expected a file of ours ({told})"
        assert raised.value.__cause__ is error
    with pytest.raises(DataError, match=r"^its own$"), foreign("f.bin", "expected a file of ours"):
        raise DataError("its own")
    with pytest.raises(KeyboardInterrupt), foreign("f.bin", "expected a file of ours"):
        raise KeyboardInterrupt
