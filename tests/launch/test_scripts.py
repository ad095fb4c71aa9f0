"""What the scripts of launch/ and tools/ hand on: all overrides of the caller, to commands about one run.

The scripts are the real ones, in a checkout whose .venv records how it is called instead of training.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.config.compose import compose, run_dir
from tests.support.runs import until

ROOT = Path(__file__).parents[2]
# Blanks, quotes, a comma, brackets, a glob and what a shell would run.
AWKWARD = ["run.dir=runs/it's a 2, (x) run", "data.path=$(touch hit) *", 'generate.prompt=say "hi"',
           "loss=[z]", "model.num_experts=16"]
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit(sys.argv[1] == "-c")       # quickstart.sh asks for a GPU: there is none
"""
# In place of a verb: it saves when it is told to stop, which takes a while.
WAITER = """#!{python}
import os, signal, sys, time
def note(word):
    with open(os.environ["RECORD"], "a") as record:
        record.write(word + "\\n")
def save(number, frame):
    time.sleep(0.3)
    note(str(number))
    sys.exit(10)
for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"):
    if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
        signal.signal(getattr(signal, name), save)
note(sys.argv[1])
note("ready")
time.sleep(60)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, and a .venv that is up to date; python there does without its packages."""
    for folder in ("launch", "tools"):
        (tmp_path / folder).mkdir()
    for script in [*(ROOT / "launch").iterdir(), ROOT / "tools" / "test.sh"]:
        shutil.copy(script, tmp_path / script.parent.name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    wanted = hashlib.sha256((tmp_path / "pyproject.toml").read_bytes()).hexdigest()
    (tmp_path / ".venv" / ".moetrain").write_text(f"{wanted} [dev,hf,deepspeed,megatron]\n")
    for name in ("moetrain", "python", "pip", "srun", "scontrol"):
        (bin / name).write_text(RECORDER.format(python=sys.executable))
        (bin / name).chmod(0o755)
    (bin / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    return tmp_path


def called(checkout: Path, script: str, *words: str, **settings: str) -> list[list[str]]:
    """The commands that a script ran: program and arguments."""
    record = checkout / "record"
    record.write_text("")
    environment = {**os.environ, "RECORD": str(record), "PYTHON": sys.executable, **settings}
    done = subprocess.run(["bash", str(checkout / script), *words], env=environment, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "hit").exists()
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.parametrize("script, command, settings", [
    ("launch/debug.sh", ["python", "-m", "moetrain", "train", "experiment=debug"], {}),
    ("launch/node.sh", ["python", "-m", "moetrain.launch"], {}),
    ("launch/nodes.sh", ["python", "-m", "moetrain.launch"], {}),
    ("launch/slurm.sbatch", ["python", "-m", "moetrain.launch"],
     {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a"}),
    ("tools/test.sh", ["python", "-m", "pytest", "tests", "-n", "2", "--dist", "loadfile"], {})])
def test_every_script_hands_its_words_on(checkout: Path, script: str, command: list[str],
                                         settings: dict[str, str]) -> None:
    settings = {**settings, "PATH": f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if script.endswith("sbatch"):                        # Slurm starts it in the folder of sbatch
        settings["PYTHON"] = str(checkout / ".venv" / "bin" / "python")
    ran = [words for words in called(checkout, script, *AWKWARD, **settings) if words[0] == "python"]
    assert ran == [[*command, *AWKWARD]]


@pytest.mark.parametrize("script", ["debug", "node", "nodes", "quickstart"])
def test_every_script_says_how_it_is_called(checkout: Path, script: str) -> None:
    done = subprocess.run(["bash", f"launch/{script}.sh", "--help"], cwd=checkout, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 0 and f"bash launch/{script}.sh" in done.stdout and "set -" not in done.stdout
    assert not (checkout / "record").exists()


@pytest.mark.parametrize("words, directory", [
    ([], "runs/quickstart"), (["run.name=qs16", "run.steps=4"], "runs/qs16"),
    (AWKWARD, "runs/it's a 2, (x) run"),
    (["experiment=debug"], "runs/debug"), (["run.nproc=4"], "runs/quickstart"),
    (["parallel=ddp", "run.nproc=2"], "runs/quickstart")])
def test_quickstart_is_about_one_run(checkout: Path, words: list[str], directory: str) -> None:
    ran = [call[1:] for call in called(checkout, "launch/quickstart.sh", *words) if call[0] == "moetrain"]
    assert [verb for verb, *_ in ran] == ["train", "eval", "generate"]
    assert all(rest[0] == "experiment=quickstart" and rest[len(rest) - len(words):] == words
               for _, *rest in ran)
    # And what the script adds goes with what was typed
    assert str(run_dir(compose(ran[0][1:]))) == directory


def test_quickstart_trains_evaluates_and_continues_the_run_that_is_named(
        checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    run = "runs/it's 2, (x) a=b"
    words = [f"run.dir={run}", "run.steps=2", "model.num_experts=4", "model.dim=16", "model.expert_dim=8",
             "parallel=single",
             "eval.windows=1", "generate.tokens=2", "data.path=text", "log.wandb=off"]
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} the quick brown fox. " * 40)
    monkeypatch.chdir(tmp_path)
    for call in called(checkout, "launch/quickstart.sh", *words):
        if call[0] == "moetrain":
            assert main(call[1:]) == 0
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.removeprefix("runs/")]
    assert f"{run}, step 2" in said and "order 4" in said and "def main(" in said
    # What the summary says to type next is typed.
    advised = [shlex.split(line.partition("moetrain ")[2])
               for line in said.splitlines() if " moetrain " in line]
    assert [verb for verb, *_ in advised] == ["eval", "report", "generate"]
    for command in advised:
        assert main(command) == 0 and command[1:] == [f"run.dir={run}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_quickstart_alone_reaches_what_it_runs(checkout: Path, number: int) -> None:
    """It is no orphan: it saves, with code 10, and the script ends with that and runs nothing else."""
    (checkout / ".venv" / "bin" / "moetrain").write_text(WAITER.format(python=sys.executable))
    record = checkout / "record"
    script = subprocess.Popen(["bash", str(checkout / "launch" / "quickstart.sh")], text=True,
                              start_new_session=True,
                              env={**os.environ, "RECORD": str(record), "PYTHON": sys.executable})
    until(lambda: record.exists() and "ready" in record.read_text(), limit_s=60)
    if number == signal.SIGINT:                          # Ctrl-C: a terminal sends it to all of them
        os.killpg(script.pid, number)
    else:
        script.send_signal(number)
    assert script.wait(60) == 10
    assert record.read_text().split()[-3:] == ["train", "ready", str(int(number))]


def test_quickstart_refuses_flags(checkout: Path) -> None:
    done = subprocess.run(["bash", str(checkout / "launch" / "quickstart.sh"), "-m", "run.seed=1,2"],
                          text=True, capture_output=True,
                          env={**os.environ, "RECORD": str(checkout / "record"), "PYTHON": sys.executable},
                          timeout=60)
    assert done.returncode == 2 and "was given -m" in done.stderr
