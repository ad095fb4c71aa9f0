"""Prepared data against its source, for random trees: each byte is in the tokens or in the account.

The reader here shares nothing with the package: it parses `.tokens` files by docs/reference/files.md.
"""

import csv
import gzip
import io
import json
import os
import struct
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from moetrain.data.preparation.prepare import prepare
from moetrain.errors import DataError

LETTERS = 'abc ,"\\\n:;ßéя字🙂'
TEXTS = st.builds(lambda text, times: "T" + text * times, st.text(LETTERS, max_size=40), st.integers(1, 40))


def tokens(folder: Path, split: str) -> list[bytes]:
    """The documents of a split of bytes, in order."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tokens")):
        raw = path.read_bytes()
        assert raw[:8] == b"MOETOKEN"
        start = 20 + struct.unpack_from("<I", raw, 12)[0]
        header = json.loads(raw[20:start])
        offsets = struct.unpack_from(f"<{header['documents'] + 1}Q", raw, start)
        at = start + 8 * (header["documents"] + 1) + 4 * header["documents"]
        ids = struct.unpack_from(f"<{header['tokens']}H", raw, at)
        for begin, end in zip(offsets, offsets[1:]):
            assert ids[end - 1] == 256
            found.append(bytes(ids[begin:end - 1]))
    return found


def as_text(texts: list[str]) -> bytes:
    return texts[0].encode()


def as_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()


def as_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text, "meta": {"a": [1]}} for text in texts], indent=1).encode()


def as_csv(texts: list[str]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([["id", "text"],
                                                     *([number, text] for number, text in enumerate(texts))])
    return file.getvalue().encode()


WRITERS = {"txt": as_text, "jsonl": as_lines, "json": as_array, "csv": as_csv}
READ = st.tuples(st.sampled_from(["", "a/", "b/c/", "x y/"]), st.sampled_from(list(WRITERS)), st.booleans(),
                 st.lists(TEXTS, min_size=1, max_size=4))
LEFT_OUT = st.sampled_from([(".git/x", b"hidden"), ("a/.y", b"hidden too"), ("b/z.bin", b"a\0b" * 30),
                            ("b/t.pdf", b"%PDF-1.7\n" * 9),
                            ("e.txt", b""), ("runs/a/log/attempts.jsonl", b"{}"),
                            ("runs/a/checkpoints/x", b"ours")])
SPLIT = st.sampled_from(["", "train/", "valid/", "test/"])


class Tree:
    """A corpus that is written out, and what it holds by side."""

    def __init__(self, root: Path, files: list, odd: list) -> None:
        self.sides: dict[str, list[str]] = {"": [], "train/": [], "valid/": [], "test/": []}
        self.bytes = 0
        given = {side for side, _ in files}
        self.is_split = "train/" in given and bool(given & {"valid/", "test/"})
        for number, (side, (folder, kind, packed, texts)) in enumerate(files):
            texts = texts[:1] if kind == "txt" else texts
            raw = WRITERS[kind](texts)
            self._write(root / f"{side}{folder}{number}.{kind}{'.gz' if packed else ''}",
                        gzip.compress(raw) if packed else raw)
            self.sides[side] += texts
        has_run = any(name.startswith("runs/") for name, _ in odd)
        for name, raw in odd + [("runs/a/log/attempts.jsonl", b"{}")] * has_run:
            self._write(root / name, raw)

    def _write(self, path: Path, raw: bytes) -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        self.bytes += len(raw)

    def texts(self, *sides: str) -> list[bytes]:
        return [text.encode() for side in sides for text in self.sides[side]]


# Without the phase that shrinks: a tree is slow to make.
@settings(max_examples=50, phases=[Phase.generate], deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])
@given(files=st.lists(st.tuples(SPLIT, READ), min_size=1, max_size=9),
       odd=st.lists(LEFT_OUT, max_size=4, unique=True), cap=st.sampled_from([None, None, 700]))
def test_source_and_prepared_data_agree_to_the_byte(files: list, odd: list, cap: int | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "in")
        tree = Tree(root, files, odd)
        trained = ("", "train/") if tree.is_split else tuple(tree.sides)
        held = ("valid/",) if tree.is_split else ()
        try:
            folder = prepare(path=str(root), out=Path(name, "out"), tokenizer="bytes", allow_left_out=1.0,
                             domain_cap=cap)
        except DataError as error:  # too little text to hold some out, or all of it in the validation split
            assert (error.id == "E-DATA-035" or error.id == "E-DATA-104"
                    and not set(tree.texts(*trained)) - set(tree.texts(*held))), error
            return
        account = json.loads((folder / "dataset.json").read_text())["account"]
        files_, text = account["files"]["data.path"], account["text"]
        assert (files_["bytes"] == tree.bytes
                == sum(row["bytes"] for row in files_["read"] + files_["left_out"]))
        assert files_["bytes"] == sum(os.stat(path).st_size for path in root.rglob("*") if path.is_file())
        assert files_["files"] == sum(row["files"] for row in files_["read"] + files_["left_out"])
        every = tree.texts(*trained, *held)
        assert text["bytes"] == sum(map(len, every)) and text["documents"] == len(every)
        became = {what: tally["bytes"] for what, tally in text["became"].items()}
        assert sum(became.values()) == text["bytes"]
        train, heldout = tokens(folder, "train"), tokens(folder, "heldout")
        assert became["trained on"] == sum(map(len, train)) and became["held out"] == sum(map(len, heldout))
        own = set(tree.texts(*held))
        if own:
            assert Counter(heldout) == Counter(own)
            assert (became.get("also in the held-out text", 0)
                    == sum(len(text) for text in set(tree.texts(*trained)) & own))
        expected = set(tree.texts(*trained)) - own
        assert (became.get("duplicates", 0)
                == sum(map(len, every)) - sum(map(len, set(tree.texts(*trained)))) - sum(map(len, own)))
        if cap is None:
            rest = Counter() if own else Counter(heldout)
            for text_ in train:                # whole, or all but its last twentieth, which is held out
                whole = text_
                if text_ not in expected:
                    whole = next(full for full in expected
                                 if full.startswith(text_) and rest[full[len(text_):]])
                expected -= {whole}
                rest -= Counter([whole[len(text_):]] * (whole != text_))
            assert expected == set(rest) and "cut by data.domain_cap" not in became
        else:
            assert all(any(full.startswith(text_) for full in expected) for text_ in train)


def test_duplicates_are_in_the_account(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for number in range(30):
            (tmp_path / "in" / folder / f"{number}.txt").write_text(f"text {number} of the {'same' * 30}")
    (tmp_path / "in" / "two" / "more.txt").write_text("one more text " * 30)
    folder = prepare(path=str(tmp_path / "in"), out=tmp_path / "out", tokenizer="bytes")
    text = json.loads((folder / "dataset.json").read_text())["account"]["text"]
    assert text["documents"] == 61 and text["became"]["duplicates"]["documents"] == 30
    assert text["became"]["duplicates"]["bytes"] * 2 + 14 * 30 == text["bytes"]


@pytest.mark.parametrize("name, raw, format", [("a.tar", b"x" * 257 + b"ustar", "a tar archive"),
                                               ("a.pdf", b"%PDF-1.4 ", "a PDF document"),
                                              ("book.bin", b"words\0" * 99, "")])
def test_most_of_the_bytes_left_out_is_refused(tmp_path: Path, name: str, raw: bytes, format: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "readme.md").write_text("the text of this corpus is packed\n" * 60)
    (source / ".hidden").write_bytes(bytes(9_000_000))                 # nobody meant it to be read
    (source / name).write_bytes(raw * (4000 // len(raw) + 1))
    with pytest.raises(DataError) as caught:
        prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes")
    error = caught.value
    assert (error.id == "E-DATA-140" and error.code == 12 and name in error.why
            and not (tmp_path / "out").exists())
    assert format in error.why and "not text" in error.why
    allowed = error.next.partition("data.allow_left_out=")[2].split()[0]
    folder = prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes", allow_left_out=float(allowed))
    with pytest.raises(DataError, match="E-DATA-140"):                 # also where the data is there already
        prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes")
    (source / name).unlink()
    assert prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes") == folder


def test_undecodable_bytes_count_as_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_bytes(b"\xfc" * 600 + b"\n" + b"plain words\n" * 700)
    (source / "b.txt").write_text("more words " * 20)
    folder = prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes")
    undecodable = json.loads((folder / "dataset.json").read_text())["account"]["text"]["undecodable"]
    assert undecodable == {"files": 1, "bytes": 600, "first": "a.txt"}
    with pytest.raises(DataError, match="E-DATA-140.*") as caught:
        prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes", allow_left_out=0.05)
    assert "undecodable" in caught.value.why


def test_the_account_of_another_source_with_the_same_text_is_its_own(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both give the same tokens, so the same folder; each has its own account, even if not read again."""
    for name, extra in (("one", "a.bin"), ("two", "b.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("the same words " * 400)
        (tmp_path / name / extra).write_bytes(b"\0" * 20)
    for _ in range(2):
        for name, extra in (("one", "a.bin"), ("two", "b.bin")):
            caplog.clear()
            with caplog.at_level("INFO"):
                prepare(path=str(tmp_path / name), out=tmp_path / "out", tokenizer="bytes")
            assert any("left out" in record.message and extra in record.message for record in caplog.records)


def test_what_is_left_out_unread_is_said_as_it_is_now(tmp_path: Path,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "in"
    (source / "runs/a/log").mkdir(parents=True)
    (source / "text.txt").write_text("the same words " * 400)
    (source / "x.bin").write_bytes(b"\0" * 20)
    attempts = source / "runs/a/log/attempts.jsonl"
    for size in (100, 300):
        attempts.write_bytes(b"a" * size)
        caplog.clear()
        with caplog.at_level("INFO"):
            prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes")
        said = "\n".join(record.message for record in caplog.records)
        assert (f"3 files, {6020 + size:,} bytes" in said and f"own output: 1 file, {size} bytes" in said
                and "20 bytes (x.bin" in said)
        assert size == 100 or "prepared before" in said


@pytest.mark.parametrize("domains, warned", [([f"www.site{number}.com" for number in range(60)], "host"),
                                             ([str(number) for number in range(60)], "own"),
                                             (["a", "b.c", "d"] * 20, None)])
def test_a_domain_that_looks_like_an_address_is_warned_of_once(tmp_path: Path, domains: list[str],
                                                               warned: str | None,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    rows = [json.dumps({"text": f"text {number} of {domain} " * 60, "domain": domain})
            for number, domain in enumerate(domains)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with caplog.at_level("WARNING"):
        prepare(path=str(tmp_path / "a.jsonl"), out=tmp_path / "out", tokenizer="bytes")
    found = [record.message for record in caplog.records if "data.domain_key" in record.message]
    assert len(found) == (warned is not None) and all(warned in message for message in found)


def test_a_cap_inside_a_character_is_in_the_account(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("字" * 2000)
    folder = prepare(path=str(tmp_path / "a.txt"), out=tmp_path / "out", tokenizer="bytes", domain_cap=1000)
    text = json.loads((folder / "dataset.json").read_text())["account"]["text"]
    assert {what: tally["bytes"] for what, tally in text["became"].items()} == {
        "trained on": 948, "held out": 51, "cut by data.domain_cap": 5001}
    assert len(tokens(folder, "train")[0]) == 948


def test_held_out_text_of_ones_own_has_a_ledger_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(4):
        for folder, shift in (("text", 0), ("mine", 3)):           # text/3 and mine/0 are the same
            (source / folder).mkdir(parents=True, exist_ok=True)
            (source / folder / f"{number}.txt").write_text(f"text {number + shift} of four " * 50)
    (source / "mine" / "x.pdf").write_bytes(b"%PDF-1.7\n")
    folder = prepare(path=str(source), held_out=str(source / "mine"), out=tmp_path / "out", tokenizer="bytes")
    account = json.loads((folder / "dataset.json").read_text())["account"]
    text, mine = account["files"]["data.path"], account["files"]["data.held_out"]
    assert ([(row["reason"], row["files"]) for row in text["left_out"]] == [("data.held_out", 5)]
            and text["read"][0]["files"] == 4)
    assert ([(row["reason"], row["files"]) for row in mine["left_out"]] == [("not text", 1)]
            and mine["read"][0]["files"] == 4)
    assert sum(row["bytes"] for row in text["left_out"]) == mine["bytes"]
    assert {what: tally["documents"] for what, tally in account["text"]["became"].items()} == {
        "trained on": 3, "held out": 4, "also in the held-out text": 1}
