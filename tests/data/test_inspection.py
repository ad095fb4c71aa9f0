"""`moetrain data inspect`: what would be read, and nothing written."""

import gzip
import json
from pathlib import Path

import pytest

from moetrain.__main__ import main
from tests.support.tree_content import everything


def corpus(root: Path) -> Path:
    for number in range(30):
        folder = root / ("code" if number % 3 else "prose")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"text {number} of übung\n" * 30)
    rows = "".join(json.dumps({"text": f"record {number} " * 40, "domain": "records"}) + "\n"
                   for number in range(25))
    (root / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (root / "x.tar").write_bytes((b"x" * 257 + b"ustar").ljust(600))
    (root / ".hidden").write_text("x")
    return root


def test_it_says_what_prepare_does_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture) -> None:
    root = corpus(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    assert main(["data", "inspect", "in", "--json", "run.steps=10", "train.seq_len=64",
                 "train.global_batch=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert everything(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert main(["data", "prepare", f"data.path={root}", "data.cache=out"]) == 0
    description = json.loads((Path(capsys.readouterr().out.splitlines()[-1]) / "dataset.json").read_text())
    for side in ("train", "heldout"):
        assert found["tokens"][side] == sum(counts["tokens"] for counts in description[side].values())
        assert {name: sides[side] for name, sides in found["domains"].items()} == {
            name: {"documents": counts["documents"], "bytes": counts["bytes"]}
            for name, counts in description[side].items()}
    for name in ("files", "text"):
        said, kept = (record[name] for record in (found["account"], description["account"]))
        assert (said == kept or name == "files" and said["data.path"].pop("path")
                and kept["data.path"].pop("path") and said == kept)
    assert found["epochs"] == 10 * 4 * 64 / found["tokens"]["train"] and found["error"] is None
    (packed,) = [file for file in found["files"]["data.path"] if file["name"] == "rows.jsonl.gz"]
    assert (packed["format"], packed["compression"], packed["documents"]) == ("JSON lines", "gzip", 25)
    assert {document["domain"] for document in found["documents"]} == {"code", "prose", "records"}
    for document in found["documents"]:
        assert bytes(document["tokens"]).decode(errors="ignore").startswith(document["text"][:40])


def test_a_person_sees_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture) -> None:
    corpus(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "inspect", "in"]) == 0
    shown = capsys.readouterr().out
    for words in ("JSON lines in gzip 1 file", "and 11 more", "a tar archive", "tar -xf", "hidden", "records",
                  "epochs", "documents as they are"):
        assert words in shown, shown
    assert max(map(len, shown.splitlines())) < 400


def test_tokens_are_estimated_with_the_tokenizer_that_is_named(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    corpus(tmp_path / "in")
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.train_from_iterator(["text record übung"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>"]))
    library.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "inspect", "in", "--json", "data.tokenizer=tokenizer.json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["data", "prepare", "data.path=in", "data.cache=out", "data.tokenizer=tokenizer.json"]) == 0
    description = json.loads((Path(capsys.readouterr().out.splitlines()[-1]) / "dataset.json").read_text())
    real = sum(counts["tokens"] for counts in description["train"].values())
    assert found["tokens"]["estimated"] and abs(found["tokens"]["train"] - real) < 0.1 * real


def test_what_prepare_would_refuse_is_told_with_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture) -> None:
    root = corpus(tmp_path / "in")
    (root / "big.tar").write_bytes((b"x" * 257 + b"ustar").ljust(90_000))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "inspect", "in"]) == 0
    assert "prepare would refuse this (E-DATA-140)" in capsys.readouterr().out
    assert main(["data", "inspect", "in", "--json", "data.allow_left_out=0.9"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] is None
    (root / "z.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    assert main(["data", "inspect", "in"]) == 12
    said = capsys.readouterr()
    assert "E-DATA-131" in said.err and "big.tar" in said.out
    assert main(["data", "inspect", "missing"]) == 12 and main(["data", "inspect", "data=synthetic"]) == 2
