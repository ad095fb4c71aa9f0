"""`moetrain slurm` without a Slurm: what is checked, what is printed, what is refused. With one: tests/launch/test_slurm.py."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.cli import slurm
from moetrain.nodes.node import config_for

RUN = ["parallel=ep", "experiment=debug"]


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["slurm", "--dry-run", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["slurm", *words]) == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_script_holds_the_settings(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    text = printed(capsys, "--nodes", "2", "--gpus-per-node=4", "--time", "1-00:00:00", "--partition=gpu", "--account", "me", "--lead=120",
                   "--exclusive", "--qos=long", *RUN)
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert options == ["--job-name=debug", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=1-00:00:00", "--partition=gpu",
                       "--account=me", "--signal=USR1@120", "--requeue", "--open-mode=append", f"--chdir={tmp_path}",
                       f"--output={tmp_path}/runs/debug/log/slurm-%j.log", "--exclusive", "--qos=long"]
    assert "export NPROC=4\n" in text and "scontrol requeue" in text and "srun" in text
    assert list(tmp_path.iterdir()) == []                # nothing is written


def test_the_script_is_the_template_without_its_header(capsys: pytest.CaptureFixture) -> None:
    body = slurm.template().partition("\n\n")[2]
    assert body.startswith("python=") and printed(capsys, *RUN).endswith(body) and "#SBATCH" not in body


def test_the_script_is_valid_and_keeps_words_apart(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = [*RUN, "run.name='two words'", "loss=[z]", "data=text", "data.path='$(touch hit) ; touch hit'"]
    text = printed(capsys, *words)
    settings = text.partition("python=")[0]
    done = subprocess.run(["bash", "-euc", f"{settings}\nprintf '%s\\n' \"$@\""], text=True, capture_output=True, cwd=tmp_path)
    assert done.stdout.splitlines() == words and not (tmp_path / "hit").exists()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert f'#SBATCH --output="{tmp_path}/runs/two words/log/slurm-%j.log"' in text and '#SBATCH --job-name="two words"' in text


def test_the_config_is_checked_for_the_ranks_of_the_job(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    error = refused(capsys, "--nodes=3", "--gpus-per-node=8", "--lead=soon", "--nproc-per-node", *RUN, "optim.lrr=1")
    assert "24 ranks" in error and "E-CONFIG-003" in error and error.count("E-CONFIG-049") == 2
    assert list(tmp_path.iterdir()) == []
    assert "#SBATCH --nodes=3" in printed(capsys, "--nodes=3", "parallel=ddp", "experiment=debug", "train.global_batch=9")


def test_ranks_are_those_of_the_nodes(capsys: pytest.CaptureFixture) -> None:
    job, errors = slurm.parse(["--nodes=2", "--gpus-per-node=8", "--nproc-per-node=4"])
    assert (job.ranks, errors) == (8, []) and slurm.parse([])[0].ranks == 1
    assert "export NPROC=1\n" in slurm.script(slurm.parse([])[0], config_for(["experiment=debug"], 1))


@pytest.mark.parametrize("word, said", [
    ("-N2", "--option"), ("--ntasks=4", "the script sets it itself"), ("--signal=TERM@5", "the script sets it itself"),
    ("--nodes=0", "whole number"), ("--nodes=x", "whole number"), ("--time", "takes a value"), ("--exclusive\n#SBATCH --uid=0", "--option"),
    ("--time=1\n#SBATCH --uid=0", "takes a value")])
def test_options_that_cannot_be(word: str, said: str, capsys: pytest.CaptureFixture) -> None:
    error = refused(capsys, *RUN, word)
    assert error.count("E-CONFIG-049") == 1 and said in error


def test_without_slurm(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(capsys, *RUN)
    assert "E-CONFIG-047" in error and "--dry-run" in error and list(tmp_path.iterdir()) == []


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of PATH for a program of that name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "sbatch"


def test_a_directory_that_cannot_be_written(capsys: pytest.CaptureFixture, sbatch: Path, tmp_path: Path) -> None:
    sbatch.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(tmp_path))}/submitted\n")
    sbatch.chmod(0o755)
    (tmp_path / "file").write_text("")
    assert main(["slurm", *RUN, "run.dir=file/run"]) == 14
    assert "E-DISK-021" in capsys.readouterr().err and not (tmp_path / "submitted").exists()
