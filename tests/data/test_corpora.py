"""Corpora of every shape against an independent reader: each text is in its place, every byte accounted for.

hypothesis draws trees (tests/support/random_corpora.py): formats, compressions, encodings, byte order marks,
keys of records, separators, duplicates, given splits, data.held_out, hidden files, moetrain's own output, and
what is no text. They are prepared by the command, decoded by tests/support/prepared_reader.py, and compared
with what was written.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from moetrain.__main__ import main
from moetrain.cli import data
from tests.support.corpus_files import REPLACED, SourceFile
from tests.support.prepared_reader import StoredDataset, read_dataset
from tests.support.random_corpora import Corpus, corpora

FORMATS = {"JSON as text": "text", "JSON lines": "JSON", "JSON array": "JSON", "JSON objects": "JSON"}
PROFILE: dict[str, Any] = {"derandomize": True, "database": None, "deadline": None,
                           "suppress_health_check": list(HealthCheck)}


def write(root: Path, files: Sequence[SourceFile], elsewhere: bool = False) -> None:
    for file in files:
        path = root / (elsewhere and file.elsewhere or file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.content is None:
            path.symlink_to("leads to nothing")
        else:
            path.write_bytes(file.content)


def say(*words: str) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert data.run(list(words)) == 0
    return said.getvalue()


def inspected(*keys: str) -> dict[str, Any]:
    """What `data inspect --json` prints behind warnings, which earlier commands left on the terminal."""
    lines = say("inspect", "--json", *keys).split("\n")  # not splitlines: texts hold other ends of lines
    return json.loads("\n".join(lines[lines.index("{"):]))


@contextlib.contextmanager
def folder_of_its_own() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="corpus"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def on_disk(corpus: Corpus, root: Path, elsewhere: bool = False) -> tuple[str, ...]:
    """Write the corpus below a folder; the keys that it is read with."""
    write(root / "source", corpus.files, elsewhere)
    keys = (*corpus.keys, f"data.path={root / 'source'}", "data.allow_left_out=1")
    if corpus.held_out is None:
        return keys
    held = held_folder(root, corpus.inside != elsewhere)
    write(held, corpus.held_out, elsewhere)
    return (*keys, f"data.held_out={held}")


def held_folder(root: Path, inside: bool) -> Path:
    return root / "source" / "mine" if inside else root / "held"


def prepared(cache: Path, *keys: str) -> StoredDataset:
    """What the command makes, as a reader of the tests' own sees it."""
    return read_dataset(Path(say("prepare", f"data.cache={cache}", *keys).splitlines()[-1]))


# --- the files


def check_files(corpus: Corpus, root: Path, record: dict[str, Any]) -> None:
    """The ledger of files says of every file and byte on disk what became of it."""
    held = corpus.held_out or ()
    sides = {"train": "trained on", "valid": "held out", "test": ""}
    _check_ledger(record["data.path"], root / "source",
                  [(sides[file.side], file, file.reason) for file in corpus.files]
                  + [("", file, "data.held_out") for file in held if corpus.inside])
    if corpus.held_out is None:
        assert set(record) == {"data.path"}
    else:
        _check_ledger(record["data.held_out"], held_folder(root, corpus.inside),
                      [("held out", file, file.reason) for file in held])


def _check_ledger(ledger: dict[str, Any], root: Path, files: list[tuple[str, SourceFile, str]]) -> None:
    lying = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
    sizes = [path.stat().st_size if path.exists() else 0 for path in lying]
    assert (ledger["files"], ledger["bytes"]) == (len(lying), sum(sizes))
    rows = [*ledger["read"], *ledger["left_out"]]
    assert (sum(row["files"] for row in rows), sum(row["bytes"] for row in rows)) == (len(lying), sum(sizes))
    read, left_out = Counter(), Counter()
    for side, file, reason in files:
        counts = left_out if reason else read
        counts[reason or (side, file.format, file.compression)] += (1 << 40) + len(file.content or b"")
    said_read, said_left_out = Counter(), Counter()
    for row in ledger["read"]:
        kind = FORMATS.get(row["format"], row["format"])
        said_read[row["side"], kind, row["compression"]] += (row["files"] << 40) + row["bytes"]
    for row in ledger["left_out"]:
        said_left_out[row["reason"]] += (row["files"] << 40) + row["bytes"]
    assert said_read == read
    assert said_left_out == left_out


# --- the texts


def check_texts(corpus: Corpus, dataset: StoredDataset) -> None:
    """Every text is trained on, held out or left out as it must be, and nothing else is there."""
    read = [file for file in corpus.files if not file.reason]
    trained = [document for file in read if file.side == "train" for document in file.documents]
    held_files = [*(file for file in read if file.side == "valid"), *(corpus.held_out or ())]
    held = [document for file in held_files for document in file.documents]
    stored_train, stored_held = dataset.texts("train"), dataset.texts("heldout")
    assert (corpus.cap is not None
            or len({text for _, text in stored_train}) == len(stored_train)), "twice in the training text"
    assert len({text for _, text in stored_held}) == len(stored_held), "twice in the held-out text"
    if corpus.shared:
        _check_share(trained, stored_train, stored_held)
    else:
        held_texts = _first_domains(held)
        assert {text: domain for domain, text in stored_held} == held_texts
        rest = [(domain, text) for domain, text in trained if text not in held_texts]
        if corpus.cap is None:
            assert {text: domain for domain, text in stored_train} == _first_domains(rest)
        else:
            _check_cap(rest, stored_train, corpus.cap)
    _check_text_ledger(corpus, dataset, trained + held, [*read, *(corpus.held_out or ())])


def _first_domains(source: list[tuple[str, bytes]]) -> dict[bytes, str]:
    """The domain of each text: of several that have it, the first keeps it."""
    first: dict[bytes, str] = {}
    for domain, text in source:
        first[text] = min(first.get(text, domain), domain)
    return first


def _check_share(source: list[tuple[str, bytes]], train: list[tuple[str, bytes]],
                 held: list[tuple[str, bytes]]) -> None:
    """A text is on one side as a whole; in a domain of fewer than twenty its end may be held out alone."""
    first = _first_domains(source)
    ends = dict((text, domain) for domain, text in held)
    beginnings = dict((text, domain) for domain, text in train)
    whole = first.keys() & (ends.keys() | beginnings.keys())
    assert not ends.keys() & beginnings.keys()
    for text in whole:
        assert (ends | beginnings)[text] == first[text]
    cut = first.keys() - whole
    assert (len(beginnings.keys() - whole) == len(ends.keys() - whole)
            == len(cut)), "parts of texts that are not there"
    for text in cut:
        begin = next(part for part in beginnings if text.startswith(part) and text[len(part):] in ends
                     and part not in whole)
        assert beginnings[begin] == ends[text[len(begin):]] == first[text]
        assert 0 < len(text) - len(begin) <= len(text) // 10, "the last twentieth, to a character"
        assert (sum(domain == first[text] for domain in first.values())
                < 20), "a text is cut although there are enough of them"
    assert held and len(held) < len(train) + len(cut)


def _check_cap(source: list[tuple[str, bytes]], stored: list[tuple[str, bytes]], cap: int) -> None:
    """A domain has at most `cap` bytes: all of it if it has fewer, else whole texts and the start of one."""
    pairs: dict[str, set[bytes]] = {}
    for text, domain in _first_domains(source).items():
        pairs.setdefault(domain, set()).add(text)
    assert {domain for domain, _ in stored} <= set(pairs)
    for domain, whole in pairs.items():
        own = [text for name, text in stored if name == domain]
        if sum(map(len, whole)) <= cap:
            assert set(own) == whole
            continue
        beginnings = [text for text in own if text not in whole]
        assert sum(map(len, own)) <= cap and len(beginnings) <= 1
        assert all(any(text.startswith(beginning) for text in whole - set(own)) for beginning in beginnings)
        assert own, "a cap leaves nothing of a domain"


def _check_text_ledger(corpus: Corpus, dataset: StoredDataset, documents: list[tuple[str, bytes]],
                       read: list[SourceFile]) -> None:
    """The ledger of texts agrees to the byte with what lies in the shards, and with what the files hold."""
    said, became = dataset.description["account"]["text"], dataset.description["account"]["text"]["became"]
    assert (said["bytes"] == sum(len(text) for _, text in documents)
            == sum(kind["bytes"] for kind in became.values()))
    assert said["documents"] == len(documents)
    for name, split in (("trained on", "train"), ("held out", "heldout")):
        stored = dataset.texts(split)
        assert became[name] == {"documents": len(stored), "bytes": sum(len(text) for _, text in stored)}, name
    known = {"trained on", "held out", "duplicates", "also in the held-out text", "cut by data.domain_cap"}
    assert set(became) <= known and (corpus.cap is not None or "cut by data.domain_cap" not in became)
    assert not corpus.counts_empty or said["empty"] == sum(file.empty for file in read)
    undecodable = [file.undecodable for file in read if file.undecodable]
    assert ((said["undecodable"]["files"], said["undecodable"]["bytes"])
            == (len(undecodable), sum(undecodable)))


# --- the properties


def check(corpus: Corpus) -> None:
    """Inspect, prepare and compare; then the same files in other places and another order."""
    with folder_of_its_own() as folder:
        keys = on_disk(corpus, folder / "one")
        before = sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))
        found = inspected(*keys)
        assert (sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))
                == before), "inspect wrote something"
        dataset = prepared(folder / "cache", *keys)
        check_files(corpus, folder / "one", dataset.description["account"]["files"])
        check_texts(corpus, dataset)
        check_inspection(corpus, found, dataset)
        moved = prepared(folder / "again", *on_disk(corpus, folder / "two", elsewhere=True))
        for name in ("fingerprint", "train", "heldout"):
            assert moved.description[name] == dataset.description[name], name
        for split in ("train", "heldout"):
            assert moved.texts(split) == dataset.texts(split)


def check_inspection(corpus: Corpus, found: dict[str, Any], dataset: StoredDataset) -> None:
    """What was said before anything was prepared is what then came.

    data.domain_cap may cut inside a character, which `prepare` then drops: up to three bytes a domain.
    """
    slack = 0 if corpus.cap is None else 3
    account, said = found["account"], dataset.description["account"]
    assert found["error"] is None and account["files"] == said["files"]
    assert {name: value for name, value in account["text"].items() if name != "became"} == {
        name: value for name, value in said["text"].items() if name != "became"}
    for what in account["text"]["became"].keys() | said["text"]["became"].keys():
        one, other = (ledger["text"]["became"].get(what, {"documents": 0, "bytes": 0})
                      for ledger in (account, said))
        assert abs(one["bytes"] - other["bytes"]) <= slack * len(found["domains"]), what
        assert slack or one == other, what
    for side in ("train", "heldout"):
        counts = dataset.description[side]
        assert found["domains"].keys() == counts.keys()
        for domain, count in counts.items():
            before = found["domains"][domain][side]
            assert (before["documents"] == count["documents"]
                    and 0 <= before["bytes"] - count["bytes"] <= slack)
        assert (0 <= found["tokens"][side] - sum(count["tokens"] for count in counts.values())
                <= slack * len(counts))
    for key, ledger in dataset.description["account"]["files"].items():
        assert sum(file["size"] for file in found["files"][key]) == ledger["bytes"]
        assert len(found["files"][key]) == ledger["files"]
    trained = dataset.texts("train")
    for document in found["documents"]:
        begin = document["text"].removesuffix(REPLACED).encode()
        assert any(text.startswith(begin) for domain, text in trained if domain == document["domain"])


@pytest.mark.full
def test_runs_in_the_folder_that_they_read_are_own_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capfd: pytest.CaptureFixture) -> None:
    """A run begins, resumes and is followed by another beside its text: none reads a file of the others."""
    write(tmp_path, [SourceFile(f"texts/{number}.txt", f"text {number} and words {number ** 2}".encode())
                     for number in range(40)])
    monkeypatch.chdir(tmp_path)
    words = ["train", "experiment=debug", "data=text", "data.path=.", "data.cache=null"]
    for name, steps in (("a", 1), ("a", 2), ("b", 1)):
        assert main([*words, f"run.name={name}", f"run.steps={steps}"]) == 0, capfd.readouterr().err
    first, second = (read_dataset(next((tmp_path / "runs" / name / "data").glob("*/dataset.json")).parent)
                     for name in ("a", "b"))
    assert first.texts("train") == second.texts("train") and first.texts("heldout") == second.texts("heldout")
    files = second.description["account"]["files"]["data.path"]
    assert [(row["files"], row["format"]) for row in files["read"]] == [(40, "text")]
    assert {row["reason"] for row in files["left_out"]} == {"own output"}
    found = inspected("data.path=.")
    _check_ledger(found["account"]["files"]["data.path"], tmp_path, [
        ("trained on", SourceFile(str(path), path.read_bytes(), format="text"),
         "" if "texts" in path.parts else "own output")
        for path in tmp_path.rglob("*") if path.is_file()])


@settings(max_examples=18, **PROFILE)
@given(corpora())
def test_every_text_is_where_it_must_be(corpus: Corpus) -> None:
    check(corpus)


@pytest.mark.full
@settings(max_examples=1000, **PROFILE)
@given(corpora())
def test_every_text_is_where_it_must_be_in_many_more(corpus: Corpus) -> None:
    check(corpus)
