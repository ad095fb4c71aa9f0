"""Every snippet of docs/howto/python.md and docs/howto/weights.md runs."""

import re
import shlex
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.config.compose import compose
from moetrain.config.groups import group_options

ROOT = Path(__file__).parents[2]
SENTENCE = "The quick brown fox jumps over the lazy dog, and nothing is heard of it again. "


def test_the_snippets_of_the_page_about_python_run_one_after_another(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    page = (ROOT / "docs/howto/python.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(40):
        (notes / f"{number}.txt").write_text(f"Note {number}. " + SENTENCE * (4 + number % 3))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets, 1):
        exec(compile(snippet, f"snippet {number}", "exec"), names)
    assert (tmp_path / "runs/notes/checkpoints/step-00000004").is_dir()
    assert (tmp_path / "runs/again/report/expert_load.png").is_file()
    assert len(names["metrics"]) == 4 and names["run"].step == 4 and len(snippets) == 11
    assert capsys.readouterr().out.endswith("('txt',)\n")


def test_the_blocks_of_the_page_about_weights_run_one_after_another(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/howto/weights.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moetrain.cli.train.draw", lambda directory: None)
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, "snippet", "exec"), {})
            continue
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
    assert (tmp_path / "runs/trained/checkpoints/step-00000002").is_dir()


def test_every_router_and_loss_has_a_row_on_the_page_about_routers_whose_words_are_a_config() -> None:
    page = (ROOT / "docs/howto/routers.md").read_text(encoding="utf-8")
    routers, losses = (re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE) for section in re.findall(
        r"^\| `(?:router|loss)=` .*?\n\n", page, re.MULTILINE | re.DOTALL))
    for words in routers[1:]:
        compose(f"router={words}".split())
    options = group_options()
    assert {words.split()[0] for words in routers[1:]} == set(options["router"])
    assert set(losses[1:]) == set(options["loss"])
