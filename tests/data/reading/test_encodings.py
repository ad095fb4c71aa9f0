"""Encodings: undecodable bytes are counted or refused; a text in any encoding is the one written."""

import gzip
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from moetrain.data.account.ledgers import FileEntry, NotText
from moetrain.data.reading.encodings import guess
from moetrain.data.reading.reader import read_file
from moetrain.data.reading.records import Reading
from moetrain.data.reading.spool import Spool
from moetrain.errors import DataError

GERMAN = ("Die Stra\u00dfe f\u00fchrt \u00fcber H\u00fcgel.\n"
          "Wir h\u00f6ren V\u00f6gel und m\u00f6chten \u00c4pfel.\nEin Satz ohne Umlaute.\n") * 30
SAMPLES = {"utf-8": "\u00fcber \u5b57 \U0001f600\r\n",
           "utf-16": "\u00fcber \U0001f600", "utf-32": "\u00fcber \U0001f600", "cp1252": "\u00fcber \u20ac",
           "koi8-r": "\u0434\u0430", "shift_jis": "\u543e\u8f29\u306f\u732b",
           "gb18030": "\u6211\u4eec\U0001f600", "iso2022_jp": "\u732b and cat", "utf-16-be": "plain"}


def read(tmp_path: Path, content: bytes, entry: FileEntry | None = None, **reading: str) -> bytes:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with Spool(tmp_path) as spool:
        (document,) = read_file(path, "own", entry or FileEntry("a.txt", 0), Reading(**reading), spool)
        return b"".join(document.blocks(spool))


def refused(tmp_path: Path, content: bytes, **reading: str) -> NotText:
    with pytest.raises(NotText) as caught:
        read(tmp_path, content, **reading)
    return caught.value


@pytest.mark.parametrize("encoding", SAMPLES)
@pytest.mark.parametrize("size", [5, 1 << 20])
def test_a_text_in_its_encoding_is_the_text(tmp_path: Path, encoding: str, size: int,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.data.reading.text_blocks.BLOCK", size)
    text, entry = f"{SAMPLES[encoding]} and\n" * 40, FileEntry("a", 0)
    for content in (text.encode(encoding), gzip.compress(text.encode(encoding))):
        assert read(tmp_path, content, entry, encoding=encoding).decode() == text and entry.undecodable == 0


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_says_the_encoding_whatever_the_key_says(tmp_path: Path, mark: str) -> None:
    for content in (GERMAN.encode(mark), gzip.compress(GERMAN.encode(mark))):
        assert read(tmp_path, content, encoding="koi8-r").decode() == GERMAN
    records = '{"text": "\u00fc"}\n{"text": ""}\n'.encode(mark)
    assert read(tmp_path, records).decode() == "\u00fc"


def test_latin_1_is_counted_or_refused_and_the_key_is_said(tmp_path: Path) -> None:
    error = refused(tmp_path, GERMAN.encode("latin-1"))
    assert error.convert == "data.encoding=cp1252" and "60 of its 90 lines" in error.why
    assert GERMAN.encode("latin-1")[error.offset] == ord("\u00df")
    entry, few = FileEntry("a", 0), ("plain line\n" * 20 + "stra\u00dfe \u00fc\n").encode("latin-1")
    assert (read(tmp_path, few, entry) == few and entry.undecodable == 2
            and entry.convert == "data.encoding=cp1252")
    assert read(tmp_path, few, encoding="latin-1") == few.decode("latin-1").encode()


@pytest.mark.parametrize("encoding", ["koi8_r", "cp932", "gb18030", "cp1251"])
def test_a_text_of_another_script_is_refused_with_its_encoding(tmp_path: Path, encoding: str) -> None:
    japanese = ("\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002\u540d\u524d\u306f\u307e\u3060"
                "\u7121\u3044\u3002\u3069\u3053\u3067\u751f\u308c\u305f\u304b\u3068\u3093\u3068"
                "\u898b\u5f53\u304c\u3064\u304b\u306c\u3002\n")
    chinese = ("\u6211\u4eec\u5927\u5bb6\u90fd\u5f88\u9ad8\u5174\uff0c\u4eca\u5929\u5929\u6c14"
               "\u771f\u597d\u3002\u5b66\u4e60\u4e2d\u6587\u5f88\u6709\u610f\u601d\u3002\n")
    russian = ("\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 "
               "\u0441\u0435\u043c\u044c\u0438 \u043f\u043e\u0445\u043e\u0436\u0438 "
               "\u0434\u0440\u0443\u0433 \u043d\u0430 \u0434\u0440\u0443\u0433\u0430.\n")
    text = {"cp932": japanese, "gb18030": chinese}.get(encoding, russian) * 20
    assert guess(text.encode(encoding)) == encoding
    assert refused(tmp_path, text.encode(encoding)).convert == f"data.encoding={encoding}"


def test_undecodable_bytes_of_an_encoding_are_replaced_and_counted(tmp_path: Path) -> None:
    entry, content = FileEntry("a", 0), b"plain line\n" * 50 + b"\x83\xff\x81\x40 rest\n"
    assert (read(tmp_path, content, entry, encoding="shift_jis").decode()
            == "plain line\n" * 50 + "\ufffd\ufffd\u3000 rest\n")
    assert entry.undecodable == 2
    whole = ("plain line\n" * 50).encode("utf-16")
    assert (read(tmp_path, whole[:-1], entry := FileEntry("a", 0)).decode()
            == ("plain line\n" * 50)[:-1] + "\ufffd" and entry.undecodable == 1)
    assert "of its bytes" in refused(tmp_path, bytes(range(128, 256)) * 20, encoding="ascii").why


def test_one_nul_in_a_book_is_kept_and_many_are_no_text(tmp_path: Path) -> None:
    book = b"a line of a book\n" * 120_000
    assert read(tmp_path, book[:-99] + b"\0" + book[-98:]) == book[:-99] + b"\0" + book[-98:]
    error = refused(tmp_path, b"words \0 words\n" * 99)
    assert error.format == "binary" and error.offset == 6
    for encoding in ("utf-16-le", "utf-16-be"):
        assert f"data.encoding={encoding}" in refused(tmp_path, GERMAN.encode(encoding)).convert


def test_undecodable_bytes_in_records_are_counted(tmp_path: Path) -> None:
    entry = FileEntry("a", 0)
    content = b'{"text": "caf\xe9"}\n' + b'{"text": ""}\n' * 9
    assert read(tmp_path, content, entry).decode() == "caf\ufffd" and entry.undecodable == 1


def test_another_encoding_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(("a\u00fcb\u5b57 line\n" * 2_000_000).encode("utf-16"), 1))
    with Spool(tmp_path) as spool:
        tracemalloc.start()
        try:
            (document,) = read_file(path, "own", FileEntry("a", 0), Reading(), spool)
            assert document.size == 26_000_000 and tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


@given(st.binary(max_size=300), st.sampled_from(["utf-8", "utf-16-le", "shift_jis", "gb18030", "cp1252"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_bytes_are_text_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes,
                                       encoding: str) -> None:
    """Whatever is read is what Python's own decoder gives, and no other exception comes."""
    tmp_path, entry = tmp_path_factory.mktemp("any"), FileEntry("a", 0)
    (tmp_path / "a").write_bytes(content)
    with Spool(tmp_path) as spool:
        try:
            documents = list(read_file(tmp_path / "a", "own", entry,
                                       Reading(text_key=None, encoding=encoding), spool))
        except (NotText, DataError):                    # DataError: it begins like a compressed file
            return
        text = b"".join(block for document in documents for block in document.blocks(spool))
    if encoding == "utf-8":
        assert text == content.removeprefix(b"\xef\xbb\xbf") or content[:2] in (b"\xff\xfe", b"\xfe\xff")
    elif not content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        assert text.decode() == content.decode(encoding, "replace")
        assert (entry.undecodable > 0) == (_problem(content, encoding) is not None)


def _problem(content: bytes, encoding: str) -> UnicodeError | None:
    try:
        content.decode(encoding)
    except UnicodeError as error:
        return error
    return None
