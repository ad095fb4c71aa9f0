"""`moetrain slurm` without Slurm: what is checked, printed and refused.

tests/launch/test_slurm.py submits jobs.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.cli import slurm
from moetrain.launch.slurm_node import node_shapes, resource_options
from moetrain.launch.slurm_options import parse

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
    text = printed(capsys, "--nodes", "2", "--gpus-per-node=4", "--time", "1-00:00:00", "--partition=gpu",
                   "--account", "me", "--lead=120",
                   "--exclusive", "--qos=long", *RUN)
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert options == ["--job-name=debug", "--nodes=2", "--ntasks-per-node=1", "--time=1-00:00:00",
                       "--partition=gpu",
                       "--account=me", "--signal=USR1@120", "--requeue", "--open-mode=append",
                       f"--chdir={tmp_path}",
                       f"--output={tmp_path}/runs/debug/log/slurm-%j.log", "--gpus-per-node=4", "--exclusive",
                       "--qos=long"]
    assert "export NPROC=4\n" in text and "scontrol requeue" in text and "srun" in text
    assert list(tmp_path.iterdir()) == []                # nothing is written


def test_the_script_is_the_template_without_its_header(capsys: pytest.CaptureFixture) -> None:
    body = slurm.template().partition("\n\n")[2]
    assert body.startswith("python=") and printed(capsys, *RUN).endswith(body) and "#SBATCH" not in body


def test_the_script_is_valid_and_keeps_words_apart(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = [*RUN, "run.name=two words", "loss=[z]", "data=text", "data.path=$(touch hit) ; touch hit"]
    text = printed(capsys, *words)
    settings = text.partition("python=")[0]
    done = subprocess.run(["bash", "-euc", f"{settings}\nprintf '%s\\n' \"$@\""], text=True,
                          capture_output=True, cwd=tmp_path)
    assert done.stdout.splitlines() == words and not (tmp_path / "hit").exists()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert f'#SBATCH --output="{tmp_path}/runs/two words/log/slurm-%j.log"' in text
    assert '#SBATCH --job-name="two words"' in text


def test_the_config_is_checked_for_the_ranks_of_the_job(capsys: pytest.CaptureFixture,
                                                        tmp_path: Path) -> None:
    error = refused(capsys, "--nodes=3", "--gpus-per-node=8", "--lead=soon", "--nproc-per-node", *RUN,
                    "optim.lrr=1")
    assert "24 ranks" in error and "E-CONFIG-003" in error and error.count("E-CONFIG-049") == 2
    assert list(tmp_path.iterdir()) == []
    assert "#SBATCH --nodes=3" in printed(capsys, "--nodes=3", "parallel=ddp", "experiment=debug",
                                          "train.global_batch=9")


def test_ranks_are_those_of_the_nodes(capsys: pytest.CaptureFixture) -> None:
    job, errors = parse(["--nodes=2", "--gpus-per-node=8", "--nproc-per-node=4"], {})
    assert (job.ranks, errors) == (8, []) and parse([], {})[0].ranks == 1
    assert "export NPROC=1\n" in printed(capsys, "experiment=debug")


@pytest.mark.parametrize("words", [
    ["--gpus-per-node=8"], ["--gpus-per-node=h100:8"], ["--gres=gpu:8"], ["--gres=gpu:h100:8"],
    ["--gres", "nvme:1,gpu:h100:8"],
    ["--gres=gres/gpu:8"], ["--gpus=16"], ["--gpus", "h100:16"], ["-G", "16"], ["-G16"],
    ["--gpus-per-task=8"],
    ["--tres-per-task=cpu=64,gres/gpu=8"], ["--tres-per-node=gres/gpu:h100:8"],
    ["--gpus=16", "--gpus-per-node=8"]], ids=" ".join)
def test_ranks_follow_from_every_way_to_ask_for_gpus(words: list[str]) -> None:
    job, errors = parse([*words, "-N", "2"], {})
    assert (job.nproc, job.ranks, errors) == (8, 16, [])
    assert len(job.sbatch_options) == sum(word.startswith("-") for word in words)        # Slurm gets them too


def test_the_config_is_checked_for_gpus_asked_for_by_gres(capsys: pytest.CaptureFixture) -> None:
    words = ["--gres", "gpu:h100:8", "-N2", "parallel=ep", "parallel.ep=8", "experiment=debug"]
    text = printed(capsys, *words, "train.global_batch=16")
    assert "export NPROC=8\n" in text and "#SBATCH --gres=gpu:h100:8\n" in text
    assert "#SBATCH --nodes=2\n" in text
    assert "16 ranks" in refused(capsys, "--dry-run", *words)


def test_gpus_that_the_environment_asks_for_are_counted() -> None:
    assert parse([], {"SBATCH_GRES": "gpu:4"})[0].nproc == 4
    assert parse(["--gres=gpu:2"],
                 {"SBATCH_GRES": "gpu:4"})[0].nproc == 2          # what is typed wins, as in sbatch


@pytest.mark.parametrize("words, said", [
    (["--gpus=15", "--nodes=2"], "all 2 nodes"), (["--gpus-per-socket=4"], "does not follow"),
    (["--ntasks-per-gpu=1"], "does not follow"),
    (["--gres=gpu:8", "--gpus-per-node=4"], "--gres=gpu:8 means 8"), (["--gres=gpu:many"], None),
    (["--gpus=8k"], "cannot be read")])
def test_gpus_that_make_no_number_of_ranks_are_refused(words: list[str], said: str | None) -> None:
    job, errors = parse(words, {})
    assert [error.id for error in errors] == (["E-CONFIG-049"] if said else [])
    assert said is None or said in errors[0].what + errors[0].why


NODES = ("gpu*|64|512000|gpu:h100:8(S:0-1)|2-00:00:00\n"
         "gpu*|96|1000000|gpu:h100:8|2-00:00:00\n"
         "short|32|100000|(null)|30:00\n")


@pytest.mark.parametrize("words, expected", [
    (["--gpus-per-node=8"], ["--cpus-per-task=64", "--mem=0", "--time=24:00:00"]),
    (["--gres=gpu:2"], ["--cpus-per-task=16", "--mem=128000M", "--time=24:00:00"]),
    (["--gpus-per-node=8", "--mem=9G", "--time=1:00:00"], ["--cpus-per-task=64"]),
    (["--gpus-per-node=8", "--exclusive"], ["--mem=0", "--time=24:00:00"]),
    (["--gpus-per-node=8", "-c", "12"], ["--mem=0", "--time=24:00:00"]),
    (["--partition=short", "--nproc-per-node=4"], ["--cpus-per-task=4", "--mem=12500M", "--time=30:00"]),
    (["--partition=other"], ["--time=24:00:00"])], ids=lambda words: " ".join(words))
def test_a_job_takes_its_share_of_a_node(words: list[str], expected: list[str], sinfo: Path) -> None:
    """By the smallest node that has the GPUs; what is typed stays. A job's time fits into its partition."""
    job = parse(words, {})[0]
    assert resource_options(job, node_shapes(job.values.get("--partition"))) == expected


def test_without_sinfo_it_is_said_that_nothing_is_known(capsys: pytest.CaptureFixture,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["slurm", "--dry-run", *RUN]) == 0
    said = capsys.readouterr()
    assert "--cpus-per-task and --mem" in said.err and "#SBATCH --time=24:00:00" in said.out
    assert "--mem" not in said.out


def test_a_prologue_and_a_container(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "two words.sh").write_text("export NCCL_DEBUG=INFO\n")
    text = printed(capsys, "--setup", "two words.sh", "--container-image=nvcr.io/x:1",
                   "--container-mounts=/my data:/data", *RUN)
    settings = text.partition("python=")[0]
    shown = "printf '%s\\n' \"$SETUP\" \"$PYTHON\" \"${step_options[@]}\""
    done = subprocess.run(["bash", "-euc", f"{settings}\n{shown}"], text=True, capture_output=True)
    assert done.stdout.splitlines() == [f"{tmp_path}/two words.sh", "python3",
                                        "--container-image=nvcr.io/x:1",
                                        "--container-mounts=/my data:/data"]
    assert "#SBATCH --container" not in text             # the step runs in it, not the script
    assert "PYTHON=/opt/python\n" in printed(capsys, "--python=/opt/python", "--container-image=x", *RUN)
    assert "E-CONFIG-180" in refused(capsys, "--dry-run", "--setup=none.sh", *RUN)


def test_a_sweep_is_one_array_job(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    text = printed(capsys, "-m", "--at-once=2", *RUN, "run.seed=1,2", "optim.lr=1e-3,2e-3")
    assert "#SBATCH --array=0-3%2\n" in text and "slurm-%A_%a.log" in text
    assert "#SBATCH --job-name=debug\n" in text
    settings, found = text.partition("python=")[0], []
    for task in range(4):
        done = subprocess.run(["bash", "-euc", f"{settings}\nprintf '%s\\n' \"$@\""], text=True,
                              capture_output=True,
                              env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)})
        found.append(done.stdout.splitlines()[len(RUN):])
    assert found == [[f"run.seed={seed}", f"optim.lr={lr}",
                      f"run.name=debug-seed-{seed}-lr-{lr}"] for seed in (1, 2) for lr in (0.001, 0.002)]
    assert refused(capsys, "-m", *RUN, "run.seed=1,2", "optim.lrr=1").count("E-CONFIG-003") == 1
    assert "E-CONFIG-012" in refused(capsys, *RUN, "run.seed=1,2")


@pytest.mark.parametrize("word, said", [
    ("-n2", "--option"), ("--ntasks=4", "the script sets it itself"),
    ("--signal=TERM@5", "the script sets it itself"),
    ("--nodes=0", "whole number"), ("--nodes=x", "whole number"), ("--time", "takes a value"),
    ("--exclusive\n#SBATCH --uid=0", "--option"),
    ("--time=1\n#SBATCH --uid=0", "takes a value")])
def test_options_that_cannot_be(word: str, said: str, capsys: pytest.CaptureFixture) -> None:
    error = refused(capsys, *RUN, word)
    assert error.count("E-CONFIG-049") == 1 and said in error


def test_without_slurm(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
                       tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(capsys, *RUN)
    assert "E-CONFIG-047" in error and "--dry-run" in error and list(tmp_path.iterdir()) == []


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sinfo that lists NODES."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sinfo"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{NODES}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of PATH for a program of that name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "sbatch"


def test_a_directory_that_cannot_be_written(capsys: pytest.CaptureFixture, sbatch: Path,
                                            tmp_path: Path) -> None:
    sbatch.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(tmp_path))}/submitted\n")
    sbatch.chmod(0o755)
    (tmp_path / "file").write_text("")
    assert main(["slurm", *RUN, "run.dir=file/run"]) == 14
    assert "E-DISK-021" in capsys.readouterr().err and not (tmp_path / "submitted").exists()
