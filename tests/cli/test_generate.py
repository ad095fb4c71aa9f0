"""`moetrain generate` on a terminal: text as it is drawn, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm_start
from tests.support.trained_run import corpus, train

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], pytest.param(["run.nproc=2", "parallel=ep"], marks=pytest.mark.ranks)],
                         ids=["one", "two"])
def test_ctrl_c_ends_a_text_with_its_line(tmp_path: Path, ranks: list[str]) -> None:
    corpus(tmp_path / "corpus")
    train(tmp_path, "data.tokenizer=bytes")
    clean = {name: value for name,
             value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = ["generate", "mine", "generate.prompt=the cat ", "generate.tokens=1000000",
             "generate.temperature=1e-9", *ranks]
    process = warm_start.Popen([sys.executable, "-m", "moetrain", *words], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert process.stdout.read(12).startswith("the cat ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, (process.returncode, err)
    assert ranks or out.endswith("\n")
