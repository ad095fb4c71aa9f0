"""Corpora as users have them, prepared and compared with what an independent reader finds in the source."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings, strategies as st

from moetrain.data.corpus.sources import domain_of
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import TokenStream, open_prepared
from moetrain.data.reading.records import Reading
from moetrain.errors import DataError


def story(number: int) -> str:
    return f"document {number} says \u00fcber \u5b57 {number * number}\n\"quoted\"\n" * 30


def texts(path: Path, out: Path, **reading: str | None) -> dict[str, list[str]]:
    """The documents of the dataset of a path, by domain. Tokens are bytes, and 256 ends a document."""
    prepared, found = open_prepared(prepare(path=str(path), out=out, tokenizer="bytes",
                                            reading=Reading(**reading)), verify=True), {}
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
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": text})
                                                                         for text in STORIES).encode()))
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
    assert "".join(sorted(texts(tmp_path / "a.txt", tmp_path / "out", encoding="cp1252")["txt"], key=len,
                          reverse=True)) == text


def test_few_undecodable_bytes_are_said_with_file_and_key(tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for number in range(20):
        text = "plain\n" * 99 + f"{number} caf\u00e9\n" * (number == 7)
        (tmp_path / "in" / f"{number}.txt").write_bytes(text.encode("latin-1") + b"%d" % number)
    with caplog.at_level(logging.WARNING):
        prepare(path=str(tmp_path / "in"), out=tmp_path / "out", tokenizer="bytes")
    said = [record.getMessage() for record in caplog.records if "data.encoding" in record.getMessage()]
    assert (len(said) == 1 and "1 of 20 files, 1 in all" in said[0] and "7.txt" in said[0]
            and "data.encoding=cp1252" in said[0])


def test_separated_stories_and_keys_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("<|endoftext|>\n".join(STORIES))
    assert texts(tmp_path / "stories.txt", tmp_path / "out", separator="<|endoftext|>") == {"txt": STORIES}
    lines = [json.dumps({"content": text, "meta": {"pile_set_name": ("web", "books")[number % 2]}})
             for number, text in enumerate(STORIES)]
    (tmp_path / "pile.jsonl").write_text("\n".join(lines))
    found = texts(tmp_path / "pile.jsonl", tmp_path / "out", text_key="content",
                  domain_key="meta.pile_set_name")
    assert found == {"web": STORIES[::2], "books": STORIES[1::2]}


def test_keys_that_find_nothing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"content": text} for text in STORIES]}))
    with pytest.raises(DataError) as caught:
        texts(tmp_path / "a.json", tmp_path / "out", text_key="content")
    assert caught.value.id == "E-DATA-137" and "a.json" in caught.value.why
    with caplog.at_level(logging.WARNING):
        texts(tmp_path / "a.json", tmp_path / "out", separator="---")
    assert sum("data.separator=---" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("name, domain", [
    ("corpus.00", "text"), ("corpus.txt.05", "txt"), ("c4-train.00000-of-01024.json.gz", "json"),
    ("a.json.00003_of_00010.zst", "json"),
    ("part-00000-of-00010.parquet", "parquet"), ("wiki.00000-of-00010", "text"), ("python/a.00", "python"),
    ("a.tar.gz", "tar"), ("a", "text"), ("v1.2.md", "md"), (".5", "text"), ("00", "text")])
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
    one, two = (prepare(path=str(tmp_path / "a.jsonl"), out=tmp_path / "out", tokenizer="bytes",
                        reading=Reading(text_key=key))
                for key in ("text", "title"))
    assert (one != two
            and prepare(path=str(tmp_path / "a.jsonl"), out=tmp_path / "out", tokenizer="bytes") == one)


def test_a_file_that_stops_being_text_behind_its_records_is_refused(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in STORIES)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines.encode("latin-1", "replace"))
    (tmp_path / "in" / "b.txt").write_text("text " * 999)
    with pytest.raises(DataError) as caught:
        texts(tmp_path / "in", tmp_path / "out")
    assert caught.value.id == "E-DATA-136" and "data.encoding=cp1252" in caught.value.next


def as_table(separator: str) -> Callable[[list[dict]], str]:
    def write(records: list[dict]) -> str:
        file = io.StringIO()
        writer = csv.DictWriter(file, ["n", "text", "domain"], delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue()

    return write


FORMATS: dict[str, Callable[[list[dict]], str]] = {
    "": lambda records: "---\n".join(record["text"] + "\n" for record in records),  # text with separators
    ".jsonl": lambda records: "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
    ".json": json.dumps,
    ".csv": as_table(","), ".tsv": as_table("\t")}
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress,
                                               ".xz": lzma.compress, ".bz2": bz2.compress}
PROSE = st.text(st.sampled_from("ab \u00fc\u5b57\U0001f600,;\"\\{}[]:\t"), min_size=1,
                max_size=40).map(lambda text: f"s{text}e")
FILES = st.tuples(st.sampled_from(list(FORMATS)), st.sampled_from(list(PACKED)),
                  st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
                  st.sampled_from(["", "web/", "web/deep/"]),
                  st.lists(st.tuples(PROSE, st.sampled_from(["", "own"])), min_size=1, max_size=4))


@given(st.lists(FILES, min_size=1, max_size=6))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_tree_of_anything_is_the_texts_that_were_written(tmp_path_factory: pytest.TempPathFactory,
                                                           files: list) -> None:
    root, wanted = tmp_path_factory.mktemp("tree"), {}
    (root / "valid.txt").write_text("held out\n")
    for number, (form, packed, encoding, folder, rows) in enumerate(files):
        records = [{"n": str(number), "text": text, "domain": domain} for text, domain in rows]
        path = root / "in" / folder / f"part.{number:03d}{form}{packed}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKED[packed](FORMATS[form](records).encode(encoding)))
        for record in records:
            text = record["text"] if form else record["text"] + "\n"
            own = record["domain"] if form else ""
            domain = own or folder.partition("/")[0] or form.removeprefix(".") or "text"
            wanted[text] = min(domain, wanted.get(text, domain))  # a duplicate stays in the first domain
    prepared = open_prepared(prepare(path=str(root / "in"), out=root / "out", tokenizer="bytes",
                                     held_out=str(root / "valid.txt"), reading=Reading(separator="---")),
                             verify=True)
    assert (documents_of(prepared.train, prepared.domains)
            == sorted((domain, text) for text, domain in wanted.items()))
    ledger = prepared.description["account"]["files"]["data.path"]
    assert ledger["bytes"] == sum(path.stat().st_size for path in (root / "in").rglob("*") if path.is_file())
    assert not ledger["left_out"] and prepared.description["account"]["text"]["undecodable"]["bytes"] == 0


def documents_of(stream: TokenStream, domains: tuple[str, ...]) -> list[tuple[str, str]]:
    ids, found = stream.read(0, stream.size).tolist(), []
    for start, domain in zip(stream.document_starts.tolist(), stream.document_domains.tolist()):
        found.append((domains[domain], bytes(ids[start:ids.index(256, start)]).decode()))
    return sorted(found)
