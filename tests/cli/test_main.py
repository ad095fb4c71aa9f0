"""The command line as a user meets it: real processes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from moetrain.__main__ import VERBS, main
from moetrain.cli.help import FIRST_KEYS, pages, section_page
from moetrain.config.compose import compose
from moetrain.config.values import schema_keys
from moetrain.errors import Preempted
from tests.support.captured_command import ROOT, moetrain


@pytest.mark.parametrize("argv",
                         [["--help"], ["train", "--help"], ["train", "--help", "router"],
                          ["train", "optim.lrr=1"], ["eval", "run.name=none"], ["version"],
                                  ["train", "--cfg", "job"]])
def test_help_and_errors_need_no_torch(argv: list[str], tmp_path: Path) -> None:
    done = moetrain(*argv, cwd=tmp_path, python=("-X", "importtime"))
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
               if line.startswith("import time:")}
    assert "moetrain.errors" in modules
    assert not {name for name in modules if name.split(".")[0] in ("torch", "numpy", "wandb", "matplotlib")}


def test_help_lists_verbs_and_promised_keys(tmp_path: Path) -> None:
    done = moetrain("--help", cwd=tmp_path)
    assert done.returncode == 0 and all(word in done.stdout
                                        for word in (*VERBS, *FIRST_KEYS, "model=", "experiment="))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_or_runs(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert main([verb, "--help"]) == 0
    assert "moetrain" in capsys.readouterr().out


def test_train_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--help", "all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in schema_keys().values():
        assert f"{key.path}=" in text and " ".join(key.help.split()) in text
    assert "router.weights" in text and "loss.z.weight" in text and "quickstart" in text


def test_every_page_of_help_fits_a_terminal(capsys: pytest.CaptureFixture) -> None:
    for argv in ([], *([verb, "--help"] for verb in VERBS if verb != "version"),
                 *(["train", "--help", page] for page in (*pages(), "logging"))):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert text.strip() and max(map(len, text.splitlines())) <= 80, argv
    assert main(["train", "--help", "optin"]) == 2
    assert "moetrain train --help optim" in capsys.readouterr().err


@pytest.mark.parametrize("argv, text", [
    (["train", "experiment=debug", "optim.lr=1", "--help"], "Keys to know first"),
    (["train", "mine", "--help", "loss=[z]"], "Keys to know first"),
    (["train", "optim", "-h"], "optim=muon"), (["train", "--help", "optim.lr"], "peak learning rate"),
    (["help", "train"], "Keys to know first"),
    (["help"], "first steps"), (["--help", "train", "optim"], "optim=muon"),
    (["train", "--help", "loss.z.weight"], "loss.z.weight=")])
def test_help_is_given_wherever_it_is_asked_for(argv: list[str], text: str,
                                                capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 0
    assert text in capsys.readouterr().out


def test_a_page_that_is_not_there_leads_to_the_key(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--help", "optim.lrr"]) == 2
    assert "moetrain train --help optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize("verb",
                         [["train"], ["train", "-m", "run.seed=1,2"], ["eval", "mine"], ["generate", "mine"],
                          ["data", "prepare"],
                                  ["slurm", "--dry-run"]])
def test_a_folder_that_is_gone_is_named(verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(verb) == 2
    assert "E-CONFIG-141  the current folder is gone" in capsys.readouterr().err


def test_a_broken_file_of_conf_leaves_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    losses = tmp_path / "conf" / "loss"
    (losses / "entropy.yaml").write_text("entropy_loss:\n  _target_: moetrain.losses.z.ZLoss\n")
    (losses / "half.yaml").write_text("half:\n  _target_: moetrain.losses.z.ZLoss\n   weight: 1\n")
    for place in ("config.groups", "cli.help"):
        monkeypatch.setattr(f"moetrain.{place}.config_dir", lambda: tmp_path / "conf")
    text = " ".join(section_page("loss").split())
    assert "loss.z.weight=" in text and "entropy.yaml, line 1: entropy.yaml describes entropy_loss" in text
    assert "half.yaml cannot be read" in text and "line 3" in text


def test_config_errors_come_together_and_leave_nothing_behind(tmp_path: Path) -> None:
    done = moetrain("train", "optim.lrr=1", "run.steps=abc", "model=deubg", "parallel=ep", "run.nproc=3",
                    cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert [line[:12] for line in done.stderr.splitlines() if line.startswith("E-")] == [
        "E-CONFIG-002", "E-CONFIG-004", "E-CONFIG-003", "E-CONFIG-035"]
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_an_error_is_printed_once_and_debug_shows_the_traceback(tmp_path: Path) -> None:
    first = moetrain("train", "optim.lrr=1", cwd=tmp_path, RANK="0", WORLD_SIZE="1")
    assert first.returncode == 2 and first.stderr.count("E-CONFIG-003") == 1
    debug = moetrain("train", "optim.lrr=1", cwd=tmp_path, MOETRAIN_DEBUG="1")
    assert debug.returncode == 2 and "Traceback" in debug.stderr


@pytest.mark.parametrize("argv, text", [
    (["trian"], "moetrain train"), (["data"], "moetrain data prepare"),
    (["data", "prepar"], "moetrain data prepare"),
    (["report"], "moetrain report <"), (["report", "none"], "experiment=debug"),
    (["train", "--cfg", "hydra"], "--cfg job"),
    (["generate", "run.name=none"], "experiment=debug"), (["data", "prepare", "data.pth=x"], "data.path"),
    (["data", "prepare", "data=synthetic"], "data=text"), (["train", "model"], "choose model from"),
    (["train", "run"], "run.<key>=<value>"),
    (["train", "run=mine"], "run.name=mine"), (["train", "run.steps=1e3"], "run.steps=1e3 is not int"),
    (["train", "run.steps='7'"], "try     run.steps=7"), (["train", "5"], "try     moetrain train --help"),
    (["train", "--optim.lr=1"], "try     optim.lr=1"), (["train", "x"], "try     moetrain train --help"),
    (["train", "-m", "run.seed=1,2", "optim.lrr=1"], "optim.lr")])
def test_wrong_commands_say_what_to_type(argv: list[str], text: str, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("E-CONFIG") == 1 and list(tmp_path.iterdir()) == []


def test_cfg_job_prints_the_resolved_config(tmp_path: Path) -> None:
    done = moetrain("train", "experiment=debug", "optim.lr=0.5", "--cfg", "job", cwd=tmp_path)
    config = compose(["experiment=debug", "optim.lr=0.5"])
    tree = yaml.safe_load(done.stdout)
    assert done.returncode == 0 and tree["optim"]["lr"] == 0.5 and tree["model"]["dim"] == config.model.dim
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_gives_each_job_its_own_run(tmp_path: Path) -> None:
    done = moetrain("train", "-m", "experiment=debug", "run.seed=1,2", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0
    for seed in (1, 2):
        assert f"name: debug-seed-{seed}\n" in done.stdout and f"seed: {seed}\n" in done.stdout


def test_a_preempted_worker_of_torchrun_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def preempted(argv: list[str]) -> int:
        raise Preempted(1, "stopped", where="step 3", why="SIGTERM", next="the same command")

    monkeypatch.setattr("moetrain.cli.version.run", preempted)
    assert main(["version"]) == 10
    monkeypatch.setenv("RANK", "0")
    assert main(["version"]) == 0
    monkeypatch.setenv("MOETRAIN_LAUNCHED", "1")
    assert main(["version"]) == 10


def test_status_says_how_training_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    def train(config: object, **hooks: object) -> None:
        run = tmp_path / "runs" / "debug"
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"st')
        if config.run.seed:
            raise Preempted(1, "stopped", where="step 7", why="SIGTERM", next="the same command")

    monkeypatch.chdir(tmp_path)
    for name, member in (("train.loop", types.SimpleNamespace(train=train)),
                         ("report.loads", types.SimpleNamespace(draw_loads=print))):
        monkeypatch.setitem(sys.modules, f"moetrain.{name}", member)
    for seed, code in ((0, 0), (1, 10)):
        assert main(["train", "experiment=debug", f"run.seed={seed}"]) == code
        status = json.loads((tmp_path / "runs" / "debug" / "status.json").read_text())
        assert (status["code"], status["step"]) == (code, 7)
    assert status["reason"] == "E-PREEMPTED-001  stopped"
