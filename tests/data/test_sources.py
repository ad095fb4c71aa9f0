"""Corpora as people have them, prepared and compared with what a reader of the test's own finds in the source."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from moetrain.data.prepare import prepare
from moetrain.data.prepared import open_prepared
from moetrain.data.records import Reading
from moetrain.data.sources import domain_of
from moetrain.errors import DataError


def story(number: int) -> str:
    return f"document {number} says \u00fcber \u5b57 {number * number}\n\"quoted\"\n" * 30


def texts(path: Path, out: Path, **reading: str | None) -> dict[str, list[str]]:
    """The documents of the dataset of a path, by domain. Tokens are bytes, and 256 ends a document."""
    prepared, found = open_prepared(prepare(path=str(path), out=out, tokenizer="bytes", reading=Reading(**reading)), verify=True), {}
    for stream in (prepared.train, prepared.heldout):
        for domain, name in enumerate(prepared.domains):
            start, end = stream.domain_range(domain)
            parts: list[list[int]] = [[]]
            for token in stream.read(start, end - start).tolist():
                parts[-1].append(token) if token != 256 else parts.append([])
            found.setdefault(name, []).extend(bytes(part).decode() for part in parts[:-1])
    return {name: sorted(documents) for name, documents in found.items()}


STORIES = sorted(map(story, range(40)))


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "a.ndjson", "corpus", "array.json"])
def test_records_are_documents_whatever_the_name(tmp_path: Path, name: str) -> None:
    records = [{"text": story(number), "url": "x"} for number in range(40)]
    content = json.dumps(records) if name == "array.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(content)
    assert sum(texts(tmp_path / name, tmp_path / "out").values(), []) == STORIES


def test_compressed_text_beside_a_readme_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in STORIES).encode()))
    (tmp_path / "in" / "readme.md").write_text("what this is " * 20)
    assert texts(tmp_path / "in", tmp_path / "out")["jsonl"] == STORIES


def test_a_book_with_one_nul_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    book = "".join(f"line {number} of a book\n" for number in range(20_000))
    book = book[:5000] + "\0" + book[5000:]
    (tmp_path / "in" / "book.txt").write_text(book)
    (tmp_path / "in" / "small.md").write_text("a small file\n" * 99)
    assert "".join(sorted(texts(tmp_path / "in", tmp_path / "out")["txt"], key=len, reverse=True)) == book


def test_german_in_latin_1_is_refused_and_read_with_the_key_that_is_said(tmp_path: Path) -> None:
    text = "".join(f"Zeile {number}: Stra\u00dfe, H\u00fcgel und V\u00f6gel\n" for number in range(500))
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        texts(tmp_path / "a.txt", tmp_path / "out")
    assert caught.value.id == "E-DATA-031" and caught.value.next.startswith("data.encoding=cp1252")
    assert "".join(sorted(texts(tmp_path / "a.txt", tmp_path / "out", encoding="cp1252")["txt"], key=len, reverse=True)) == text


def test_few_undecodable_bytes_are_said_with_file_and_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number}.txt").write_bytes(("plain\n" * 99 + f"{number} caf\u00e9\n" * (number == 7)).encode("latin-1") + b"%d" % number)
    with caplog.at_level(logging.WARNING):
        prepare(path=str(tmp_path / "in"), out=tmp_path / "out", tokenizer="bytes")
    said = [record.getMessage() for record in caplog.records if "data.encoding" in record.getMessage()]
    assert len(said) == 1 and "1 of 20 files, 1 in all" in said[0] and "7.txt" in said[0] and "data.encoding=cp1252" in said[0]


def test_separated_stories_and_keys_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("<|endoftext|>\n".join(STORIES))
    assert texts(tmp_path / "stories.txt", tmp_path / "out", separator="<|endoftext|>") == {"txt": STORIES}
    lines = [json.dumps({"content": text, "meta": {"pile_set_name": ("web", "books")[number % 2]}}) for number, text in enumerate(STORIES)]
    (tmp_path / "pile.jsonl").write_text("\n".join(lines))
    found = texts(tmp_path / "pile.jsonl", tmp_path / "out", text_key="content", domain_key="meta.pile_set_name")
    assert found == {"web": STORIES[::2], "books": STORIES[1::2]}


@pytest.mark.parametrize("name, domain", [
    ("corpus.00", "text"), ("corpus.txt.05", "txt"), ("c4-train.00000-of-01024.json.gz", "json"), ("a.json.00003_of_00010.zst", "json"),
    ("part-00000-of-00010.parquet", "parquet"), ("wiki.00000-of-00010", "text"), ("python/a.00", "python"), ("a.tar.gz", "tar"), ("a", "text"),
    ("v1.2.md", "md"), (".5", "text"), ("00", "text")])
def test_numbered_shards_are_one_domain(name: str, domain: str) -> None:
    assert domain_of(name) == domain


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("the old text\n" * 99)
    times = source.stat()
    first = prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes")
    source.write_text("the new text\n" * 99)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source.stat().st_size == times.st_size and source.stat().st_mtime_ns == times.st_mtime_ns
    assert prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes") != first


def test_another_key_is_another_source(tmp_path: Path) -> None:
    lines = [json.dumps({"text": story(number), "title": story(number + 100)}) for number in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    one, two = (prepare(path=str(tmp_path / "a.jsonl"), out=tmp_path / "out", tokenizer="bytes", reading=Reading(text_key=key))
                for key in ("text", "title"))
    assert one != two and prepare(path=str(tmp_path / "a.jsonl"), out=tmp_path / "out", tokenizer="bytes") == one


def test_a_file_that_stops_being_text_behind_its_records_is_refused(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in STORIES)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines.encode("latin-1", "replace"))
    (tmp_path / "in" / "b.txt").write_text("text " * 999)
    with pytest.raises(DataError) as caught:
        texts(tmp_path / "in", tmp_path / "out")
    assert caught.value.id == "E-DATA-136" and "data.encoding=cp1252" in caught.value.next
