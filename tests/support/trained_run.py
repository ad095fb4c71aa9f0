"""A run of three steps on text, trained in this process, and commands about it."""

import json
import random
from pathlib import Path

import pytest

from moetrain.__main__ import main

WORDS = "the cat sat on a mat and dog ran after it while sun was shining over hills rivers".split()
SMALL = ["experiment=debug", "data=text", "run.steps=3", "run.device=cpu", "model.dim=32",
         "train.seq_len=16", "train.global_batch=4"]


def corpus(folder: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Two domains of documents of about 500 bytes."""
    draw = random.Random(seed)
    for domain in ("letters", "notes"):
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            text = " ".join(draw.choices(WORDS, k=120))
            (folder / domain / f"{number}.txt").write_text(f"{seed} {number}: {text}")
    return folder


def train(folder: Path, *words: str) -> None:
    """The run runs/mine in a folder, on its corpus/ unless the words say otherwise. No pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("moetrain.cli.train.draw", lambda directory: None)
        assert main(["train", *SMALL, "data.path=corpus", "run.name=mine", *words]) == 0


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "eval.jsonl").read_text().splitlines()]


def losses(record: dict) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(("loss/", "nats_per_byte/"))}


def files(directory: Path) -> dict[str, int]:
    """Everything below a folder, with its time of change."""
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns
            for path in directory.rglob("*") if path.is_file()}
