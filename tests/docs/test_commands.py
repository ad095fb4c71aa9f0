"""Every command that README and docs/howto give is run, as a new user would type it and one after another.

`moetrain` runs in this process, cut down (tests/support/page_commands.py), after the command as it stands has
passed every rule of the config; other commands run in bash. What starts several processes, needs a network,
root or another program is run by the test that is named in ELSEWHERE. Pictures are drawn once, by `moetrain
report`: they take longer than all else.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from moetrain.__main__ import main
from moetrain.config.compose import compose
from moetrain.config.overrides import sweep
from tests.support.own_package import write_own_package
from tests.support.page_commands import MESH, ROOT, Command, commands, cut, key

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
# What is found in a command, and the test that runs such commands, or why none can.
ELSEWHERE = {
    "bash launch/quickstart.sh":
        "launch/test_scripts.py::test_quickstart_trains_evaluates_and_continues_the_run_that_is_named",
    "bash launch/node.sh": "launch/test_nodes.py::test_a_killed_rank_comes_back_and_the_run_goes_on",
    "bash launch/nodes.sh": "launch/test_nodes.py::test_two_nodes_train",
    "sbatch": "launch/test_slurm.py::test_a_job_on_two_nodes_trains",
    "moetrain train -m": "cli/test_main.py::test_a_sweep_gives_each_job_its_own_run",
    # Made by the page's Python.
    "doubled": "docs/test_howto.py::test_the_blocks_of_the_page_about_weights_run_one_after_another",
    # Goes on with generated data, where the commands of the other pages train on text.
    "moetrain train resized":
        "docs/test_howto.py::test_the_blocks_of_the_page_about_weights_run_one_after_another",
    "python -m tools.netlab":
        "tools/test_netlab.py::test_an_exchange_is_right_and_takes_the_link_of_its_class",
    "engine=deepspeed": "interop/test_deepspeed.py::test_the_command_ends_with_0_and_resumes",
    "data=memmap": "data/pretokenized/test_memmap.py::test_a_run_trains_evaluates_and_resumes",
    "data=megatron": "interop/test_megatron.py::test_a_run_trains_evaluates_and_resumes",
    "/path/to/checkpoint": "cli/test_foreign_folder.py::test_verify_says_whether_every_expert_is_there",
    "bash tools/test.sh": "it runs this test",
    "bash tools/check/gpu.sh":
        "tools/test_check_gpu.py::test_every_stage_runs_to_its_last_line_on_a_simulated_gpu",
    "python tools/build_cuda.py":
        "tools/test_build_cuda.py::test_all_kernels_compile_for_hopper_without_new_spills",
    "source .venv/bin/activate": "it changes the shell that it is typed into",
    "pip install": "it needs the network",
}
# Text that stands for something of the reader's.
THEIRS = {"/path/to/text": "text", "/path/to/tokenizer.json": "tokenizer.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands run: a text of two domains, as a reader may have it."""
    folder = tmp_path_factory.mktemp("reader")
    for domain, words in (("letters", "Dear reader, the weather is fine and we are well. "),
                          ("notes", "Buy bread; call the plumber. ")):
        (folder / "text" / domain).mkdir(parents=True)
        for number in range(24):
            text = f"{domain} {number}: " + words * (20 + number)
            (folder / "text" / domain / f"{number}.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(folder / "text/notes/0.txt")], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("README.md", "docs"):                   # pages are written for a reader who is in a checkout
        (folder / name).symlink_to(ROOT / name)
    write_own_package(folder)
    return folder


def elsewhere(command: Command) -> str | None:
    typed = " ".join(command.words)
    return next((found for found in ELSEWHERE if found in typed), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(
        page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("moetrain.cli.train.draw", lambda directory: None)
    failed, trained = {}, set()
    for command in commands(page):
        words = [re.sub("|".join(map(re.escape, THEIRS)), lambda found: THEIRS[found[0]], word)
                 for word in command.words]
        if elsewhere(command):
            code = check_only(words, command.settings)
        elif command.words[0] == "moetrain":
            named = [word.removeprefix("run.name=") for word in words if word.startswith("run.name=")]
            for name in named if words[1] == "train" else []:
                if name not in trained:                  # pages use the same names
                    shutil.rmtree(Path("runs", name), ignore_errors=True)
                trained.add(name)
            code = run([os.path.expandvars(word) for word in words[1:]])
        else:
            code = in_bash(command.text, monkeypatch)
        if code:
            failed[command.text] = (code, capsys.readouterr().err)
    assert not failed


def check_only(words: list[str], settings: dict[str, str]) -> int:
    """The overrides of a training that starts elsewhere are a config, and its script knows the settings."""
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    # A script or torchrun says how many ranks there are.
    if not any(key(word) == "run.nproc" for word in overrides):
        overrides = [word for word in overrides if key(word) not in MESH]
    for job in sweep(overrides):
        compose(job)
    for script in (word for word in words if word.startswith("launch/")):
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(name in source for name in settings), (script, settings)
    return 0


def in_bash(text: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """A variable that is set is there for the commands that follow, as in the shell of a reader."""
    variable = re.match(r"(\w+)=", text)
    script = f'{text}\nprintf %s "${variable[1]}"' if variable else text
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PATH": path})
    if variable:
        monkeypatch.setenv(variable[1], done.stdout)
    return done.returncode


def run(words: list[str]) -> int:
    """As it stands as far as the rules of the config go; then small, to its end."""
    verb, *arguments = words
    if verb == "train":
        if "--help" in arguments:
            return main(words)
        compose(arguments)
    return main([verb, *cut(verb, arguments)])


def test_what_runs_elsewhere_is_there_and_needed() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert every and {elsewhere(command) for command in every} - {None} == set(ELSEWHERE)
    for where in ELSEWHERE.values():
        if "::" in where:
            file, _, name = where.partition("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), where


def test_commands_stand_in_blocks_that_say_so() -> None:
    """Indented or in a block without `bash` they would not be found."""
    for page in PAGES:
        text = re.sub(r"^ *```bash\n.*?^ *```", "", page.read_text(encoding="utf-8"),
                      flags=re.MULTILINE | re.DOTALL)
        stray = r"^(?:    |```\n)((?:moetrain|bash|python|torchrun|sbatch|pip|NODES=\S+) .*)$"
        assert re.findall(stray, text, re.MULTILINE) == [], page
