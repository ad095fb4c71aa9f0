"""Scan of a path: own output, hidden files, links and splits, with every byte in the ledger."""

import os
from collections import Counter
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.data.account.ledgers import HELD, TRAINED
from moetrain.data.corpus.scan import Scan, scan
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import open_prepared
from moetrain.errors import DataError


def story(number: int) -> str:
    return f"document {number} says über {number * number}\n" * 60


def tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(story(number))
    return root


def names(found: Scan, side: str = TRAINED) -> list[str]:
    return [file.entry.name for file in found.side(side)]


def left_out(found: Scan) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for entry in found.ledger.left_out:
        reasons.setdefault(entry.reason, []).append(entry.name)
    return {reason: sorted(members) for reason, members in reasons.items()}


def on_disk(root: Path) -> int:
    """Bytes of every file that is there, links to files included."""
    return sum(os.stat(Path(folder, name)).st_size for folder, _, found in os.walk(root) for name in found
               if Path(folder, name).is_file())


def test_every_file_is_read_or_left_out_for_a_reason(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.txt", "b/c.txt", ".hidden", ".git/objects/x", "b/.cache/deep/y", ".git/b.txt")
    (root / "empty.txt").touch()
    (root / "nowhere").symlink_to(root / "missing")
    os.mkfifo(root / "pipe")
    found = scan(root)
    assert names(found) == ["a.txt", "b/c.txt"] and names(found, HELD) == []
    assert left_out(found) == {"hidden": [".git/b.txt", ".git/objects/x", ".hidden", "b/.cache/deep/y"],
                               "empty": ["empty.txt"], "no file": ["nowhere", "pipe"]}
    assert found.ledger.record()["bytes"] == on_disk(root) and found.ledger.record()["files"] == 9


def test_what_a_link_leads_to_is_read_once_wherever_it_lies(tmp_path: Path) -> None:
    """Datasets of the hub are links into a hidden store."""
    root = tree(tmp_path, ".store/blobs/a.txt", ".store/other.txt", "z.txt")
    (root / "data").symlink_to(root / ".store" / "blobs")
    (root / "again").symlink_to(root)
    found = scan(root)
    assert names(found) == ["data/a.txt", "z.txt"] and left_out(found) == {"hidden": [".store/other.txt"]}
    assert found.ledger.record()["bytes"] == on_disk(root)


def fake_runs(root: Path) -> Path:
    tree(root, "text/a.txt", "jobs/x/log/attempts.jsonl", "jobs/x/notes.txt", "copied/config.yaml",
         "copied/metrics.jsonl", "copied/env.json",
         "saved/config.yaml", "saved/checkpoints/step-00000010/manifest.json", "moetrain-123.log",
         "prepared/sources.json",
         "prepared/0123456789abcdef/dataset.json", "prepared/.preparing-x/train-00000.tokens",
         "hf/config.yaml", "hf/checkpoints/model.txt", "wiki/train-00000.tokens", "wiki/log/notes.txt",
         "wiki/sources.json")
    (root / "prepared/0123456789abcdef/train-00000.tokens").write_bytes(b"MOETOKEN" + bytes(90))
    return root


def test_runs_and_prepared_data_are_left_out_wherever_they_lie(tmp_path: Path) -> None:
    """Look-alikes are text: a config beside foreign checkpoints, WikiText's .tokens, another sources.json."""
    found = scan(fake_runs(tmp_path))
    assert names(found) == ["hf/checkpoints/model.txt", "hf/config.yaml", "text/a.txt", "wiki/log/notes.txt",
                            "wiki/sources.json", "wiki/train-00000.tokens"]
    assert set(left_out(found)) == {"own output"}
    assert found.ledger.record()["bytes"] == on_disk(tmp_path)


def test_what_is_named_as_our_own_is_left_out_before_it_can_be_recognised(tmp_path: Path) -> None:
    """The directory of a run at its first start."""
    found = scan(tree(tmp_path, "a.txt", "runs/x/lock", "cache/sources.json"),
                 own=(tmp_path / "runs" / "x", tmp_path / "cache", tmp_path / "none"))
    assert (names(found) == ["a.txt"]
            and left_out(found) == {"own output": ["cache/sources.json", "runs/x/lock"]})


def test_of_a_run_that_is_named_itself_its_own_files_are_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path, "config.yaml", "log/attempts.jsonl", "metrics.jsonl", "metrics.jsonl.lost",
                "data/x", "text/a.txt", "b.txt")
    assert names(scan(root)) == ["b.txt", "text/a.txt"]
    assert names(scan(fake_runs(tmp_path / "x") / "prepared" / "0123456789abcdef")) == []
    with pytest.raises(DataError, match="E-DATA-032.*") as caught:
        prepare(path=str(tmp_path / "x" / "prepared" / "0123456789abcdef"), out=tmp_path / "out",
                tokenizer="bytes")
    assert "own output" in caught.value.why and "data=tokens" in caught.value.next


def test_a_folder_with_its_runs_trains_twice_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture) -> None:
    tree(tmp_path, *(f"{number}.txt" for number in range(4)))
    monkeypatch.chdir(tmp_path)
    words = ["train", "experiment=debug", "data=text", "data.path=.", "train.seq_len=32",
             "train.global_batch=2", "eval.windows=1",
             "run.device=cpu", "model.dim=16", "model.num_layers=1", "model.num_experts=2",
             "model.expert_dim=8", "log.wandb=off"]
    assert main([*words, "run.name=a", "run.steps=2", "run.stop_at=1"]) == 0
    assert main([*words, "run.name=b", "run.steps=1"]) == 0
    assert main([*words, "run.name=a", "run.steps=2"]) == 0, capsys.readouterr()
    (one, two), = [sorted(path.name for path in tmp_path.glob("runs/*/data/*") if path.is_dir())]
    assert one == two                                    # the text alone made both
    account = open_prepared(next(tmp_path.glob("runs/b/data/*/dataset.json")).parent,
                            verify=False).description["account"]
    kept = account["files"]["data.path"]
    assert (Counter(row["reason"] for row in kept["left_out"]) == {"own output": 1}
            and kept["read"][0]["files"] == 4)


def test_a_validation_split_is_held_out_and_a_test_split_left_alone(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", "train/a.txt", "valid/b.txt", "test/c.txt", "train/code/d.py",
                "valid/code/e.py", "other/f.md")
    found = scan(root)
    assert (names(found) == ["other/f.md", "train/a.txt", "train/code/d.py"]
            and names(found, HELD) == ["valid/b.txt", "valid/code/e.py"])
    assert left_out(found) == {"test split": ["test/c.txt"]}
    prepared = open_prepared(prepare(path=str(root), out=tmp_path / "out", tokenizer="bytes"), verify=True)
    described = prepared.description
    assert prepared.domains == ("code", "other", "txt")
    assert ({name: counts["documents"] for name, counts in described["train"].items()}
            == {"code": 1, "other": 1, "txt": 1})
    assert ({name: counts["documents"] for name, counts in described["heldout"].items()}
            == {"code": 1, "other": 0, "txt": 1})
    merged = open_prepared(prepare(path=str(root), out=tmp_path / "out", tokenizer="bytes", splits=False),
                           verify=True)
    assert merged.domains == ("other", "test", "train", "valid") and merged.folder != prepared.folder


def test_held_out_text_that_is_named_wins_over_a_validation_split(tmp_path: Path) -> None:
    root = tree(tmp_path / "in", "train/a.txt", "valid/b.txt", "test/c.txt", "mine/code/d.py",
                "train/code/e.py")
    found = scan(root, held_out=root / "mine")
    assert names(found) == ["train/a.txt", "train/code/e.py"] and names(found, HELD) == []
    assert (left_out(found)
            == {"test split": ["test/c.txt"], "validation split": ["valid/b.txt"],
                "data.held_out": ["mine/code/d.py"]})
    prepared = open_prepared(prepare(path=str(root), held_out=str(root / "mine"), out=tmp_path / "out",
                                     tokenizer="bytes"), verify=True)
    assert prepared.domains == ("code", "txt")
    assert [file.label for file in scan(root, held_out=root / "valid").files
            if file.entry.name == "train/a.txt"] == ["a.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(DataError, match="E-DATA-030"):
            scan(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o755)
