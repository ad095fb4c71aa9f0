"""Text and images as sequences of ids, each with experts of its own."""

import sys
from pathlib import Path

import numpy as np

from examples.choices import print_choices
from moetrain.config.compose import compose
from moetrain.train.loop import train

LEVELS = 16                                  # gray levels of an image


def main(out: Path) -> dict[str, list[int]]:
    """Write the token files, train below `out`, and return the held-out choices by modality."""
    text = "".join(f"Picture {number} shows a slope.\n" for number in range(500)).encode()
    slopes = [(np.add.outer(np.arange(8), np.arange(8)) + shift) % LEVELS for shift in range(250)]
    ids = {"text": np.frombuffer(text, np.uint8).astype(np.uint16),
           "image": (256 + np.stack(slopes).flatten()).astype(np.uint16)}      # row by row
    for name, tokens in ids.items():
        (out / "tokens" / name).mkdir(parents=True)
        np.save(out / "tokens" / name / "all.npy", tokens)
    train(compose([
        "experiment=debug", "data=memmap", f"data.path={out / 'tokens'}", f"data.vocab_size={256 + LEVELS}",
        f"run.dir={out / 'run'}", "run.steps=4",
        "model.num_experts=8", "router=domain", "router.experts=[[0,1,2,3],[4,5,6,7]]",  # image, text
    ]))
    return print_choices(out / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
