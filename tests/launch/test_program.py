"""A user's own program: its ranks run the same program, so that they hand over the same conversion."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.launch.program import Program, program_of

MINE = """import sys
from moetrain.__main__ import main

def convert(model, config):
    import layers
    layers.add_norm(model, config)

if __name__ == "__main__":
    sys.exit(main(convert_model=convert))
"""
LAYERS = """from moetrain.model.norms import RMSNorm

def add_norm(model, config):
    norm = RMSNorm(dim=config.model.dim, eps=config.model.norm_eps)
    model.layers[0].attention.out_norm = norm
    model.layers[0].attention.register_forward_hook(lambda module, inputs, output: norm(output))
"""
WORDS = ["experiment=debug", "run.steps=2", "model.dim=16", "train.seq_len=8", "train.global_batch=2",
         "train.micro_batch=1", "eval.windows=1", "run.device=cpu", "run.name=mine", "parallel=fsdp",
         "run.nproc=2"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """mine(words): runs a program that converts the model, with a file beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text(MINE)
    (tmp_path / "src" / "layers.py").write_text(LAYERS)
    return lambda *words: subprocess.run([sys.executable, "src/mine.py", *words], capture_output=True,
                                         text=True)


@pytest.mark.full                        # three processes that import torch
def test_ranks_run_the_same_program(mine, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    """Moetrain itself, which lacks the tensors, refuses to go on; with the same conversion it does."""
    done = mine("train", *WORDS, "run.stop_at=1")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr("moetrain.cli.train.draw", lambda directory: None)
    monkeypatch.syspath_prepend("src")
    alone = [*WORDS, "run.nproc=1", "parallel=single"]
    assert main(["train", *alone]) == 13
    assert "out_norm.weight is in the checkpoint alone" in capsys.readouterr().err
    assert main(["train", *alone], convert_model=importlib.import_module("layers").add_norm) == 0
    assert "finished at step 2" in capsys.readouterr().out


def test_words_in_code_cannot_reach_the_ranks(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", *WORDS], convert_model=print) == 2
    assert "E-CONFIG-232" in capsys.readouterr().err and not list(tmp_path.glob("runs/mine/checkpoints"))


@pytest.mark.parametrize("process, words, command", [
    (["python", "mine.py", "train", "a=1"], ["mine.py", "train", "a=1"], ("mine.py",)),
    (["python", "-I", "-m", "my.cli", "train"], ["/my/cli.py", "train"], ("-I", "-m", "my.cli")),
    (["python", "bin/mine"], ["bin/mine"], ("bin/mine",)),
])
def test_a_program_is_started_as_it_was(monkeypatch: pytest.MonkeyPatch, process: list[str],
                                        words: list[str], command: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "orig_argv", process)
    monkeypatch.setattr(sys, "argv", words)
    program = program_of(print, None, from_command_line=True)
    assert program.words(["eval"]) == [sys.executable, *command, "eval"]
    assert program_of(None, None, from_command_line=True) == Program()
