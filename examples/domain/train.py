"""Two sources of text that share two experts and have two of their own each."""

import sys
from pathlib import Path

from examples.choices import print_choices
from moetrain.config.compose import compose
from moetrain.train.loop import train


def main(out: Path) -> dict[str, list[int]]:
    """Write the text, train below `out`, and return the held-out choices by domain."""
    for name, line in (("code", "def add_{0}(x):\n    return x + {0}\n"),
                       ("prose", "On day {0} the river rose again, and nobody was surprised.\n")):
        (out / "corpus" / name).mkdir(parents=True)
        (out / "corpus" / name / "all.txt").write_text("".join(map(line.format, range(400))))
    train(compose([
        "experiment=debug", "data=text", f"data.path={out / 'corpus'}", f"run.dir={out / 'run'}",
        "run.steps=4", "model.num_experts=6", "router=domain",
        "router.experts=[[0,1,2,3],[0,1,4,5]]",  # code, prose
    ]))
    return print_choices(out / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
