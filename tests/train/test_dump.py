"""A dump of routers lets a stranger compute the step's numbers again: by the program in docs/reference/files.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from moetrain.train.step import train_step
from tests.integration.training import make_run

FILES = Path(__file__).parents[2] / "docs" / "reference" / "files.md"


def dumped(overrides: list[str], directory: Path) -> list[tuple[float, dict[str, list[int]]]]:
    """(balance loss, counts) of four steps."""
    run = make_run([*overrides, "log.router_dump=true"])
    run.dump.directory = directory
    found = []
    for step in range(1, 5):
        result = train_step(run, step)
        run.dump.write(step)
        found.append((result.metrics["loss/balance"], {name: counts.tolist() for name, counts in result.counts.items()}))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [[], ["train.activation_checkpointing=full", "train.count_pass=true"]], ids=["kept", "recomputed"])
def test_a_stranger_computes_the_same_numbers(ranks, tmp_path, overrides):
    words = ["parallel=ep", "run.nproc=2", "train.micro_batch=4", "data.min_length=0.3", "run.dtype=float64", *overrides]
    truth = ranks(2).run(dumped, words, tmp_path)[0]
    program = re.search(r"```python\n(.*?)```", FILES.read_text().split("## Router dumps")[1], re.DOTALL).group(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]
    for directory, (balance, counts) in zip(sorted(tmp_path.iterdir()), truth):
        done = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True)
        assert float(done.stdout) == pytest.approx(balance, rel=1e-12)
        ids = [ids for file in directory.iterdir() for name, ids in load_file(file).items() if name.endswith("layers.1.moe/ids")]
        assert len(ids) == 4 and [sum(int((part == expert).sum()) for part in ids) for expert in range(8)] == counts["layers.1.moe"]
