"""What the program says to type can be typed: examples of the help pages, and the last line of errors.

The commands of a run's end are in tests/launch/test_scripts.py, those of foreign launchers in
test_foreign_ranks.py.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from moetrain.__main__ import VERBS, main
from moetrain.config.compose import compose, to_yaml


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run that examples speak of."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        config = compose(["experiment=quickstart", f"run.name={name}"])
        (tmp_path / "runs" / name / "config.yaml").write_text(to_yaml(config))
    return tmp_path


def commands(text: str) -> list[list[str]]:
    """Whole commands in a text: what follows `moetrain` on a line, up to two blanks, a semicolon or `or`."""
    found = re.findall(r"moetrain ((?:(?! {2,}|;| or | starts | lists |$).)+)", text, re.MULTILINE)
    return [shlex.split(words) for words in found if not re.search(r"[<\[…]|\.\.\.", words)]


def works(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the command does what it says.

    Training, jobs and what needs a checkpoint are composed and checked alone.
    """
    monkeypatch.setattr(subprocess, "run", lambda *arguments,
                        **how: subprocess.CompletedProcess([], 0, "", ""))  # jobs of a sweep, sinfo
    verb = words[0]
    if verb == "train":
        return main([*words, *([] if "--help" in words else ["--cfg", "job"])]) == 0
    if verb in ("eval", "generate", "report", "inspect", "checkpoint") and "--help" not in words:
        return main(words) in (12, 13)                   # there is the run, and nothing that it has trained
    return main([*words, *(["--dry-run"] if verb == "slurm" and "--dry-run" not in words else [])]) == 0


@pytest.mark.parametrize("page", ["", *VERBS])
def test_examples_of_the_help_pages(page: str, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    assert main([*([page] if page else []), "--help"]) == 0
    found = commands("\n".join(re.findall(r"^ {2,}(moetrain [a-z].*)$", capsys.readouterr().out,
                                          re.MULTILINE)))
    assert found or page not in ("", "train", "slurm")
    for words in found:
        assert works(words, monkeypatch), (words, capsys.readouterr())


@pytest.mark.parametrize("argv, least", [
    (["trian"], 1), (["data", "prepar"], 1), (["train", "--nope"], 1), (["eval", "none", "run.nmae=x"], 0),
    (["report", "none"], 0),
    (["train", "optim.lrr=1"], 0), (["train", "router._target_=x"], 0), (["slurm", "--nodes=x"], 0),
    (["train", "zzzzzz=1"], 1)])
def test_commands_in_the_last_line_of_errors(argv: list[str], least: int, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    advice = capsys.readouterr().err.rpartition("  try     ")[2]
    found = commands(advice)
    assert len(found) >= least, advice
    for words in found:
        if words != ["data", "prepare"]:                 # reads the built-in corpus: tests/data
            assert works(words, monkeypatch), (words, capsys.readouterr())
