"""Ranks that others start: who speaks, who is ignored, and who is refused."""

import shlex
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.launch.foreign_ranks import several_processes

POD = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}
REFUSED = [SRUN, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
                  "SLURM_STEP_ID": "0"},
           {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "8", "PMI_RANK": "3"}]
# A shell of salloc, its interactive step, srun -n1 in a larger job, one process of mpirun, a rank of torchrun
# under srun.
ALONE = [{"SLURM_NTASKS": "8"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1",
                                 "SLURM_STEP_ID": "4294967290"},
         {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
         {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, {}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import os

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ
                 if name.startswith(("SLURM_", "OMPI_", "PMI_"))
                 or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    return tmp_path


def inside(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_an_error_before_ranks_meet_is_said_by_each_with_its_number(verb: str, monkeypatch, capsys) -> None:
    inside(monkeypatch, POD)
    assert main([verb, "optim.lrr=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moetrain: rank 1 of 2\nE-CONFIG-0")


@pytest.mark.parametrize("argv, code", [
    (["report", "none"], 2), (["inspect", "none"], 2), (["checkpoint", "verify", "none"], 2),
    (["data", "prepare", "data.pth=x"], 2),
    (["slurm", "--nodes=x"], 2), (["data", "prepare", "data=synthetic", "train.global_batch=5"], 2),
    (["version"], 0)])
def test_verbs_of_one_process_ignore_ranks(argv: list[str], code: int, monkeypatch, capsys) -> None:
    inside(monkeypatch, POD)
    assert main(argv) == code
    out, error = capsys.readouterr()
    assert "rank" not in error and "global_batch" not in error and (out or "E-CONFIG" in error)


def test_a_number_of_ranks_that_is_not_asked_for_is_said(monkeypatch, capsys) -> None:
    inside(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2"})
    monkeypatch.setattr("moetrain.cli.train._train", lambda *arguments: None)
    for words, said in ((["run.nproc=4"], True), (["run.nproc=2"], False), ([], False)):
        assert main(["train", "experiment=debug", "parallel=ddp", *words]) == 0
        assert ("run.nproc=4 is ignored" in capsys.readouterr().err) == said


@pytest.mark.parametrize("environment", REFUSED)
@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_several_processes_that_know_nothing_of_each_other_are_refused(
        verb: str, environment: dict, monkeypatch, capsys, here) -> None:
    from moetrain.config.compose import compose, to_yaml

    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "config.yaml").write_text(
        to_yaml(compose(["experiment=debug", "run.name=mine"])))
    inside(monkeypatch, environment)
    words = ["mine", "parallel=ep", "run.nproc=1", "generate.prompt=it's (x)"]
    assert main([verb, *words]) == 2
    error = capsys.readouterr().err
    assert (error.count("E-CONFIG-123") == 1
            and list((here / "runs" / "mine").iterdir()) == [here / "runs" / "mine" / "config.yaml"])
    advised = shlex.split(error.rpartition("try     ")[2])
    assert ("generate.prompt=it's (x)" in advised
            and sum(word.startswith("run.nproc=") for word in advised) < 2)
    if advised[:2] == ["moetrain", "slurm"]:             # what it says to type is tried, without a Slurm
        for name in environment:
            monkeypatch.delenv(name)
        assert main([*advised[1:], "--dry-run"]) == 0


@pytest.mark.parametrize("environment", ALONE)
def test_one_process_is_left_alone(environment: dict) -> None:
    assert several_processes(environment) is None


def test_a_batch_script_may_start_ranks_of_its_own(monkeypatch, capsys) -> None:
    inside(monkeypatch, SRUN)
    monkeypatch.setattr("moetrain.cli.eval.start_ranks", lambda *arguments, **how: 0)
    assert main(["train", "experiment=debug", "parallel=ep", "run.nproc=2"]) == 0
    monkeypatch.setenv("SLURM_STEP_ID", "0")             # each task of a step would
    assert main(["train", "experiment=debug", "parallel=ep", "run.nproc=2"]) == 2
