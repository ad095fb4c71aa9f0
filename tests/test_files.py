"""Files and names from outside: no regular file, content without end, names that a terminal would obey."""

import errno
import os
from pathlib import Path

import pytest

from moetrain.errors import DataError
from moetrain.files import (
    NotAFileError,
    create,
    nearby,
    open_descriptor,
    open_to_append,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    reason,
    remedy,
    shown,
)
from tests.support.odd_files import ODD, make_odd


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("flags", [
    os.O_RDONLY, os.O_WRONLY | os.O_APPEND | os.O_CREAT, os.O_RDWR | os.O_CREAT])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, kind: str, flags: int) -> None:
    path = tmp_path / "record"
    what = make_odd(path, kind)
    with pytest.raises(NotAFileError) as refused:                # a pipe without a writer would be waited for
        os.close(open_descriptor(path, flags))
    assert reason(refused.value) == f"it is {what}, not a file"
    assert not (path.parent / "missing").exists()


def test_a_link_is_followed_where_it_may_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1]")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_json(tmp_path / "link") == [1]
    with pytest.raises(NotAFileError, match="it is a link, not a file"):
        read_bytes(tmp_path / "link", limit=9, links=False)


def test_a_file_that_is_missing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with pytest.raises(OSError, match="null byte"):
        read_json(Path(f"{tmp_path}/a\0b"))


def test_a_file_is_made_where_it_is_to_be(tmp_path: Path) -> None:
    for _ in range(2):
        with open_to_append(tmp_path / "log") as file:
            file.write(b"line\n")
    assert read_text(tmp_path / "log") == "line\nline\n"


@pytest.mark.parametrize("kind", ["fifo", "nowhere", "device"])
def test_a_new_file_takes_the_place_of_what_lies_there(tmp_path: Path, kind: str) -> None:
    make_odd(tmp_path / "draft", kind)
    with create(tmp_path / "draft") as file:
        file.write(b"new")
    assert read_text(tmp_path / "draft") == "new" and [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_what_helps_follows_from_the_failure(tmp_path: Path) -> None:
    assert remedy(OSError(errno.ENOSPC, "")) == "free space there"
    assert remedy(OSError(errno.EACCES, "")) == remedy(OSError(errno.EROFS, "")) == "make it writable"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError) as refused:
        open_to_append(tmp_path / "pipe")
    assert remedy(refused.value) == "remove what lies there"


def test_content_has_limits(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(OSError, match="it is longer than 99,999 bytes"):
        read_bytes(path, limit=99_999)
    with pytest.raises(ValueError, match="it is nested more than 64 deep"):
        read_json(path)
    for depth in range(1, 5):
        text = "[" * depth + '{"a":' + "1" + "}" + "]" * depth
        assert parse_json(text, depth=depth + 1)
        with pytest.raises(ValueError, match=f"it is nested more than {depth} deep"):
            parse_json(text, depth=depth)
    for text in ("", "{", "nul", "9" * 5000, b"\xff", '"\\ud800'):
        with pytest.raises(ValueError):
            parse_json(text)


@pytest.mark.parametrize(("name", "expected"), [
    ("Straße 中文 می‌خواهم 👩‍💻", "Straße 中文 می‌خواهم 👩‍💻"),
    ("\x1b[2Jgone\x07", "\\x1b[2Jgone\\x07"), ("a\nb\r\tc\x9b", "a\\nb\\r\\tc\\x9b"),
    (os.fsdecode(b"caf\xe9"), "caf\\xe9"), ("abc\u202edef\u2028", "abc\\u202edef\\u2028"),
    ("\ud800", "\\ud800"),
])
def test_a_name_is_shown_safely(name: str, expected: str) -> None:
    assert shown(name) == expected
    shown(name).encode()                                         # any stream can write it


def test_a_long_name_is_cut() -> None:
    assert shown("x" * 300, 20) == "x" * 19 + "…"
    assert shown("x" * 20, 20) == "x" * 20


def test_an_error_shows_names_safely_and_keeps_its_own_lines() -> None:
    error = DataError(1, "what\x1b", where=os.fsdecode(b"/caf\xe9/a\n  why     forged"), why="tab\there",
                      next="one\n          or another")
    assert str(error).splitlines() == ["E-DATA-001  what\\x1b", "  where   /caf\\xe9/a\\n  why     forged",
                                       "  why     tab\\there", "  try     one", "          or another"]


def test_a_path_is_relative_where_it_lies_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert nearby(tmp_path / "runs" / "a\x1b") == "runs/a\\x1b" and nearby(Path("runs/a")) == "runs/a"
    assert nearby(tmp_path.parent) == str(tmp_path.parent)
