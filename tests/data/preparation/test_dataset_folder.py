"""A preparation that is killed: the next one continues, and its result is that of an unbroken one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.data.preparation import split_writer
from moetrain.data.preparation.dataset_folder import unfinished_folder
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import open_prepared

ROOT = Path(__file__).parents[3]
SHARD = 5000                                             # tokens
STOPS = f"""
import os, sys
from pathlib import Path
from moetrain.data.preparation import prepare
from moetrain.data.preparation import split_writer
split_writer.SHARD_TOKENS, write, left = {SHARD}, split_writer.write_shard, [int(sys.argv[3])]
def write_and_die(path, **content):
    if path.name.startswith("train"):
        left[0] -= 1
        if not left[0]:
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), int(sys.argv[4]))
    write(path, **content)
split_writer.write_shard = write_and_die
prepare.prepare(path=sys.argv[1], out=Path(sys.argv[2]), tokenizer=sys.argv[5],
                parse_special=sys.argv[5] != "bytes")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three domains. The second has a document longer than three shards; the others share passages."""
    for number in range(60):
        folder = tmp_path / "in" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        lines = 400 if number == 4 else number % 7 * 3 + 1
        passage = (f"the passage number {number // 3} that two of the documents have, each on its own side\n"
                   if number % 3 != 1 else "")
        written = "".join(f"line {line} of {number} <|endoftext|>, as {line % 9} is\n"
                          for line in range(lines))
        (folder / f"{number}.txt").write_text(passage + written)
    return tmp_path / "in"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(["line 1 of 2"], trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False))
    library.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def stop(source: Path, out: Path, shard: int, number: int = signal.SIGKILL,
         tokenizer: str = "bytes") -> subprocess.CompletedProcess:
    """A preparation that ends by a signal while it writes this shard of the training text."""
    return subprocess.run([sys.executable, "-c", STOPS, source, out, str(shard), str(int(number)), tokenizer],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def left(out: Path) -> list[str]:
    """What lies in the folder that was not finished."""
    return sorted(path.name for path in out.glob(".preparing-*/*"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared(source: Path, out: Path, tokenizer: str) -> Path:
    return prepare(path=str(source), out=out, tokenizer=tokenizer, parse_special=tokenizer != "bytes")


@pytest.mark.parametrize("kind, shard, stay",
                         [("bytes", 1, False), ("bytes", 3, True), ("bytes", 6, True), ("file", 2, True),
                                               ("file", 4, True)])
def test_the_next_preparation_goes_on(source, tokenizer, tmp_path, monkeypatch, caplog, kind, shard,
                                      stay) -> None:
    """Shards 3 and 4 of bytes are pieces of one document: it is written again."""
    caplog.set_level("INFO")
    named = "bytes" if kind == "bytes" else tokenizer
    assert stop(source, tmp_path / "out", shard, tokenizer=named).returncode == -signal.SIGKILL
    assert (("train.resume" in left(tmp_path / "out")) == stay
            and f"train-{shard - 1:05d}.tokens" in left(tmp_path / "out"))
    monkeypatch.setattr(split_writer, "SHARD_TOKENS", SHARD)
    whole, again = (prepared(source, tmp_path / out, named) for out in ("whole", "out"))
    assert content(again) == content(whole) and len(content(whole)) >= 6 and not list(whole.glob("*.resume"))
    described = open_prepared(whole, verify=True).description
    assert 0 < described["heldout_overlap"] < 1 and (kind == "bytes" or described["special_tokens"] > 500)
    assert [record.message.endswith("documents: they stay")
            for record in caplog.records if "interrupted" in record.message] == [True] * stay
    assert sorted(os.listdir(tmp_path / "out")) == sorted([again.name, "sources.json"])


@pytest.mark.parametrize("damage", ["shard", "counts", "list"])
def test_what_is_damaged_is_not_believed(source, tmp_path, monkeypatch, caplog, damage) -> None:
    assert stop(source, tmp_path / "out", 6).returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "out").glob(".preparing-*")
    if damage == "shard":
        raw = bytearray((folder / "train-00001.tokens").read_bytes())
        raw[-1] ^= 1
        (folder / "train-00001.tokens").write_bytes(raw)
    else:
        content_ = (folder / "train.resume").read_text()
        (folder / "train.resume").write_text(content_.replace('"bytes":', '"b":') if damage == "counts"
                                             else content_[:-9])
    monkeypatch.setattr(split_writer, "SHARD_TOKENS", SHARD)
    whole, again = (prepared(source, tmp_path / out, "bytes") for out in ("whole", "out"))
    assert content(again) == content(whole) and "begins anew" in caplog.text


def test_ctrl_c_says_what_stays_and_an_error_leaves_nothing(source, tmp_path, monkeypatch) -> None:
    ended = stop(source, tmp_path / "out", 3, signal.SIGINT)
    assert (ended.returncode != 0 and "goes on behind them" in ended.stderr
            and "train.resume" in left(tmp_path / "out"))
    assert (stop(source, tmp_path / "early", 1, signal.SIGINT).returncode != 0
            and os.listdir(tmp_path / "early") == [])
    monkeypatch.setattr(split_writer, "SHARD_TOKENS", SHARD)
    monkeypatch.setattr(split_writer, "open_shard", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(source, tmp_path / "failed", "bytes")
    assert os.listdir(tmp_path / "failed") == []


def test_another_dataset_leaves_finished_shards_for_a_day_and_removes_the_rest(source, tmp_path,
                                                                               caplog) -> None:
    """At once, because the kernel releases the lock of a dead process. What another process writes stays."""
    assert stop(source, tmp_path / "out", 3).returncode == -signal.SIGKILL
    (finished,) = (tmp_path / "out").glob(".preparing-*")
    (tmp_path / "out" / ".preparing-none").mkdir()
    (tmp_path / "out" / ".preparing-none" / "heldout-00000.tokens").write_bytes(b"half of it")
    (tmp_path / "other.txt").write_text("another text\n" * 500)
    with unfinished_folder(tmp_path / "out" / "now") as written:
        prepared(tmp_path / "other.txt", tmp_path / "out", "bytes")
        assert finished.exists() and written.exists() and not (tmp_path / "out" / ".preparing-none").exists()
        with unfinished_folder(tmp_path / "out" / "now") as second:  # the same dataset, by another process
            assert second != written
        os.utime(finished, (0, 0))
        with unfinished_folder(tmp_path / "out" / "later"):
            assert not finished.exists() and written.exists()
