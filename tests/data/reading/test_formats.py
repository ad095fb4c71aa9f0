"""Formats recognized by content: each in every compression under any name, and text that looks like one."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings, strategies as st

from moetrain.data.account.ledgers import FileEntry, NotText
from moetrain.data.reading.reader import read_file
from moetrain.data.reading.records import Reading
from moetrain.data.reading.spool import Spool
from moetrain.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, "gzip": gzip.compress, "Zstandard": zstd.compress, "xz": lzma.compress, "bzip2": bz2.compress}
STORIES = ["one\ntwo \"quoted\", and {braces} [lists]", "\u00fcber \u5b57 \U0001f600",
           "comma, semicolon; tab\tend", "x" * 70_000, "last\r\n"]


def json_lines(records: list[dict]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def json_pretty(records: list[dict]) -> bytes:
    return "\n".join(json.dumps(record, indent=2, ensure_ascii=False) for record in records).encode()


def table(delimiter: str) -> Callable[[list[dict]], bytes]:
    def write(records: list[dict]) -> bytes:
        file = io.StringIO()
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue().encode()

    return write


def parquet(records: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    form, file = pytest.importorskip("pyarrow.parquet"), io.BytesIO()
    form.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=2)
    return file.getvalue()


WRITE: dict[str, Callable[[list[dict]], bytes]] = {
    "JSON lines": json_lines, "JSON array": lambda records: json.dumps(records).encode(),
    "JSON objects": json_pretty, "CSV": table(","), "TSV": table("\t"), "Parquet": parquet}


def read(path: Path, entry: FileEntry | None = None, **reading: str | None) -> list[tuple[str, str]]:
    """(domain, text) of the documents of a file, whose digests and sizes are right."""
    with Spool(path.parent) as spool:
        found = list(read_file(path, "own", entry or FileEntry(path.name, 0), Reading(**reading), spool))
        texts = [b"".join(document.blocks(spool)) for document in found]
    assert [document.size for document in found] == list(map(len, texts))
    return [(document.domain, text.decode("utf-8", "surrogateescape"))
            for document, text in zip(found, texts)]


def put(tmp_path: Path, content: str | bytes, name: str = "a") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(number: int, path: Path, **reading: str | None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **reading)
    assert caught.value.id == f"E-DATA-{number:03d}", caught.value
    return caught.value


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("form", WRITE)
@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "a.ndjson", "no suffix", "a.txt"])
def test_a_format_is_told_by_content_whatever_the_name(tmp_path: Path, form: str, compression: str,
                                                       name: str) -> None:
    if form in ("CSV", "TSV") and name == "a.ndjson":
        return                                                   # its suffix says that it is lines
    records = [{"id": str(number), "domain": ("a", "b")[number % 2], "text": story}
               for number, story in enumerate(STORIES)]
    entry = FileEntry(name, 0)
    assert read(put(tmp_path, COMPRESS[compression](WRITE[form](records)), name), entry) == [
        (record["domain"], record["text"]) for record in records]
    assert (entry.format, entry.compression) == (form, compression)


@pytest.mark.parametrize("name, text", [
    ("package.json", '{"name": "a", "version": "1"}'),
    ("book.ipynb", json.dumps({"cells": [{"source": ["a"]}], "metadata": {}}, indent=1)),
    ("a.c", "{\n  int text, domain;\n}\n{\n}\n"), ("list.json", '["a", "b"]'),
    ("numbers.json", "[1, 2]\n[3]\n"), ("a.md", "[link](to), text"), ("log", "[info] {\"text\": 1}\n"),
    ("prose.txt", "text, code, and images\nare one, two, three\n"),
    ("a.py", "text, domain = split(line)\nx, y = 1, 2\n"),
    ("set.py", "{'text': 'a'}\n{'text': 'b'}\n"), ("empty.json", "{}"), ("objects", "{} {} and more"),
    ("template", '{"text": "{{ value }}"'),
    ("long.txt", "{" + "word " * 40_000), ("words.txt", "text\nword\n"),
    ("tabs.txt", "the text\tis here\nor\tthere\n"),
    ("row.txt", "text,label\nthis line is no row of two, or three, cells\n"),
    ("ranks.txt", "line 0\nline 1\nline 2\n" * 9)])
def test_what_only_looks_like_records_stays_text(tmp_path: Path, name: str, text: str) -> None:
    entry = FileEntry(name, 0)
    assert read(put(tmp_path, text, name), entry) == [("own", text)]
    assert entry.format == ("JSON as text" if name.endswith(".json") else "text")


def test_text_key_null_reads_everything_as_it_stands(tmp_path: Path) -> None:
    for name, form in (("a.jsonl", "JSON lines"), ("a.csv", "CSV"), ("a.json", "JSON array")):
        content = WRITE[form]([{"text": "a"}, {"text": "b"}]).decode()
        assert read(put(tmp_path, content, name), text_key=None) == [("own", content)]
    with pytest.raises(NotText, match="Parquet"):
        read(put(tmp_path, parquet([{"text": "a"}])), text_key=None)


def test_one_object_with_the_text_key_is_a_record(tmp_path: Path) -> None:
    for content in ('{"text": "a story"}', '{\n "title": "x",\n "text": "a story"\n}\n'):
        assert read(put(tmp_path, content)) == [("own", "a story")]
    assert (read(put(tmp_path, '{"body": {"de": "Geschichte"}}'), text_key="body.de")
            == [("own", "Geschichte")])
    # longer than what is looked at
    assert read(put(tmp_path, json.dumps({"id": 1, "text": "y" * (17 << 20)}))) == [("own", "y" * (17 << 20))]


def test_an_array_of_texts_is_so_many_documents_and_of_words_is_text(tmp_path: Path) -> None:
    texts = ["one\ntwo \"three\"", "word", "\ud800 x", ""]
    entry = FileEntry("a", 0)
    assert (read(put(tmp_path, json.dumps(texts)), entry)
            == [("own", text) for text in (texts[0], "word", "\ufffd x")])
    assert (entry.format, entry.empty, entry.undecodable) == ("JSON array", 1, 3)
    for words in ('["a", "b"]', '["a b" and more', '[["a b"]]'):
        assert read(put(tmp_path, words, "a.json")) == [("own", words)]
    for rest in ("3", '{"text": "c"}', "null"):
        assert "not a string, as those before it are" in refused(33, put(tmp_path, f'["a b", {rest}]')).why


@pytest.mark.parametrize("form", WRITE)
def test_keys_are_paths_and_null_is_absent(tmp_path: Path, form: str) -> None:
    if form in ("CSV", "TSV"):
        records: list[dict] = [{"n": str(number), "meta.set": "" if number else "web",
                                "raw.content": f"t{number}"} for number in range(3)]
    else:
        records = [{"n": number, "meta": {"set": None if number else "web"}, "raw": {"content": f"t{number}"}}
                   for number in range(3)]
    path = put(tmp_path, WRITE[form](records), "a.csv" if form == "CSV" else "a")
    assert (read(path, text_key="raw.content", domain_key="meta.set")
            == [("web", "t0"), ("own", "t1"), ("own", "t2")])
    assert (read(path, text_key="raw.content", domain_key=None)
            == [("own", f"t{number}") for number in range(3)])


@pytest.mark.parametrize("form", WRITE)
def test_a_missing_key_lists_the_keys_that_are_there(tmp_path: Path, form: str) -> None:
    rows = [{"id": str(number), "content": f"a long story {number}"} for number in range(3)]
    path = put(tmp_path, WRITE[form](rows), {"CSV": "a.csv", "TSV": "a.tsv"}.get(form, "a"))
    error = refused(130, path)
    assert ("id, content" in error.why and error.next.startswith("data.text_key=content")
            and str(path) in error.where)
    assert ("data.text_key=null" in error.next) == (form != "Parquet")  # which is no text as it stands
    assert "id, content" in refused(132, path, text_key="content", domain_key="meta.source").why
    if form not in ("CSV", "TSV", "Parquet"):
        nested = put(tmp_path, WRITE[form]([{"meta": {"a": {"b": "x"}}, "n": 3}] * 2))
        assert "meta.a.b, n" in refused(130, nested).why


def test_a_mixed_schema_is_refused_at_its_place(tmp_path: Path) -> None:
    mixed: list[dict] = [{"text": "a"}, {"text": "b"}, {"body": "c"}]
    assert refused(130, put(tmp_path, json_lines(mixed))).where.endswith(", line 3, byte 28")
    assert ", record 3, line 1" in refused(130, put(tmp_path, json.dumps(mixed))).where
    assert refused(33,
                   put(tmp_path, '[{"text": "a"},\n{"text": "b"},\n"c"]')).where.endswith("record 3, line 3")
    assert "line 3" in refused(133, put(tmp_path, "text,n\na,1\nb\n", "a.csv")).where
    assert "3 cells, the header 2" in refused(133, put(tmp_path, "text,n\na,1\nb,2,3\n", "a.csv")).why
    refused(133, put(tmp_path, 'text,n\n"never ends,1\n' + "b,2\n" * 9, "a.csv"))
    assert "names a column twice: text" in refused(133, put(tmp_path, "text,text\na,b\n", "a.csv")).why
    assert "text\" is a number: 3" in refused(131, put(tmp_path, '{"text": "a"}\n{"text": 3}')).why
    assert "a list" in refused(131, put(tmp_path, '{"text": "a", "domain": []}\n{"text": "b"}')).why


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}',
                                     '[{"text": "a"}, {"text": "b', '[{"text": "a"},',
                                     '[{"text": "a"} {"text": "b"}]',
                                     '[{"text": "a"}] x', '[{"text": "a"},]', '{"text": "a"}\n{"text": "b"\n',
                                     '{\n"text": "a"}{\n"text": "b"'])
def test_json_that_is_cut_off_is_refused(tmp_path: Path, content: str) -> None:
    assert str(tmp_path) in refused(33, put(tmp_path, content)).where


def test_damaged_parquet_and_absent_pyarrow_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parquet([{"text": "a" * 999}] * 99)
    for content in (whole[:-9], whole[:99], whole[:20] + b"\xff" * 300 + whole[320:]):
        refused(134, put(tmp_path, content))
        refused(134, put(tmp_path, gzip.compress(content)))
    refused(131, put(tmp_path, parquet([{"text": 1}])))
    import pyarrow

    twice = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "text", "n"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice")
    assert "named text" in refused(133, tmp_path / "twice").why
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "moetrain[parquet]" in refused(135, put(tmp_path, whole)).next


def test_lone_surrogates_are_counted_and_null_is_an_empty_text(tmp_path: Path) -> None:
    entry = FileEntry("a", 0)
    path = put(tmp_path, '{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n{"text": ""}\n{"text": null}\n')
    assert read(path, entry) == [("own", "a\ufffd b"), ("own", "\U0001f600")]
    assert (entry.undecodable, entry.empty) == (3, 2)


def test_a_separator_ends_documents(tmp_path: Path) -> None:
    rule = "<|endoftext|>"
    stories = ["one\nline\n", f"in a {rule} line\n", "x" * 2_500_000 + f"\n{rule} and more\n", "\r\ncrlf\r\n",
               "end"]
    text = (f"{rule}\n" + f"{rule}\r\n".join(stories[:2]) + f"{rule}\n{rule}\n"
            + f"{rule}\n".join(stories[2:]) + f"\n{rule}")
    for content in (text.encode(), gzip.compress(text.encode()), text.encode("utf-16")):
        entry = FileEntry("a", 0)
        assert (read(put(tmp_path, content), entry, separator=rule)
                == [("own", story) for story in [*stories[:-1], "end\n"]])
        assert entry.empty == 2
    assert read(put(tmp_path, "no such line\n"), separator=rule) == [("own", "no such line\n")]
    long = "y" * (1 << 20)                                               # a block ends inside of its line
    assert read(put(tmp_path, f"{long}{rule}\nmore\n"), separator=rule) == [("own", f"{long}{rule}\nmore\n")]


def test_an_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    import tracemalloc

    record = json.dumps({"text": "a story " * 1000, "more": [1, {"a": 2}]})
    path = put(tmp_path, gzip.compress(f"[{', '.join([record] * 3000)}]".encode(), 1))          # 24 MB
    with Spool(tmp_path) as spool:
        tracemalloc.start()
        try:
            assert sum(document.size for document in read_file(path, "own", FileEntry("a", 0), Reading(),
                                                               spool)) == 24_000_000
            assert tracemalloc.get_traced_memory()[1] < 12 << 20
        finally:
            tracemalloc.stop()


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
                 min_size=1, max_size=8)


@given(TEXTS, st.sampled_from(list(WRITE)), st.sampled_from(list(COMPRESS)), st.sampled_from([" ", "\n", ""]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_library_wrote_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, texts: list[str],
                                                form: str, compression: str, around: str) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    content = WRITE[form]([{"text": text, "n": str(number)} for number, text in enumerate(texts)])
    if form != "Parquet" and not form.endswith("SV"):
        content = around.encode() + content + around.encode()
    path = put(tmp_path, COMPRESS[compression](content), "a" + {"CSV": ".csv", "TSV": ".tsv"}.get(form, ""))
    assert read(path) == [("own", text) for text in texts if text]


def test_reading_does_not_depend_on_the_size_of_blocks(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    records = [{"text": "".join(chance.choice("a\u00fc\u5b57\n\"\\,;\t{}[]\U0001f600")
                                for _ in range(chance.randrange(60)))} for _ in range(40)]
    whole = [("own", record["text"]) for record in records if record["text"]]
    for form in ("JSON lines", "JSON array", "JSON objects", "CSV"):
        path = put(tmp_path, WRITE[form]([{**record, "n": "1"} for record in records]),
                   "a.csv" if form == "CSV" else "a")
        for size in (7, 64, 1 << 20):
            with monkeypatch.context() as patch:
                patch.setattr("moetrain.data.reading.text_blocks.BLOCK", size)
                assert read(path) == whole, (form, size)
