"""Text is taken as the shell hands it over; a path is never empty, and `~` is the home directory."""

import re
import shlex
from pathlib import Path

import pytest

from moetrain.__main__ import main
from moetrain.config.compose import compose, for_run, from_yaml, run_dir, to_yaml
from moetrain.config.overrides import sweep
from moetrain.config.values import flatten, schema_keys
from moetrain.errors import ConfigErrors

TEXTS = ["import ", "str(x)", "cost ${USD}", ' "quoted" ', "a, b", "f(x) = {y: [", "???", r"\${x}",
         r"a\\${b}", "", "a=b", "~", "é: #1"]
PATHS = [path for path, key in schema_keys().items() if key.is_path]


def errors_of(*overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigErrors) as caught:
        compose(overrides)
    return [(error.id, error.next) for error in caught.value.errors]


@pytest.mark.parametrize("text", TEXTS)
def test_text_arrives_as_it_was_typed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a reference too, and again from the config.yaml that the run keeps."""
    config = compose([f"generate.prompt={text}", f"log.wandb_project={text}", "optim.eps=${model.norm_eps}"])
    assert (config.generate.prompt, config.log.wandb_project, config.optim.eps) == (text, text, 1e-6)
    monkeypatch.chdir(tmp_path)
    run_dir(config).mkdir(parents=True)
    (run_dir(config) / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(run_dir(config) / "config.yaml") == config
    assert for_run(["run.name=default", "eval.windows=${eval.batch}"]).generate.prompt == text


def test_null_is_none_where_a_key_may_be_none() -> None:
    config = compose(["run.dir=null", "generate.prompt=null", "+run.name=1e3"])
    assert (config.run.dir, config.generate.prompt, config.run.name) == (None, "null", "1e3")


def test_a_sweep_splits_text_and_quotes_keep_a_comma() -> None:
    assert sweep(["run.name=a b,007"]) == [["run.name=a b"], ["run.name=007"]]
    assert sweep(["generate.prompt='a, b',c d", 'run.dir="x,y"']) == [["generate.prompt=a, b", "run.dir=x,y"],
                                                                     ["generate.prompt=c d", "run.dir=x,y"]]


def test_every_key_about_files_is_a_path() -> None:
    about = {path for path, key in schema_keys().items() if key.type in (str, str | None)
             and re.search(r"\b(path|file|folder|directory)\b", key.help)}
    assert about - {"run.name"} <= set(PATHS), "mark it in config/schema.py: key(..., path=True)"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_never_empty_and_home_is_expanded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert flatten(compose([f"{path}=~/x"]))[path] == "/home/somebody/x"
    for empty in ("", " "):
        (code, advice), *rest = errors_of(f"{path}={empty}")
        assert (code, rest) == ("E-CONFIG-101", []) and path in advice
    (code, advice), *rest = errors_of(f"{path}=~nobody-of-that-name/x")
    assert (code, rest) == ("E-CONFIG-102", [])
    compose([advice.partition(" for ")[0]])


def test_a_run_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose(["run.dir=~/r"])
    run_dir(config).mkdir(parents=True)
    (tmp_path / "r" / "config.yaml").write_text(to_yaml(config))
    assert run_dir(for_run(["run.dir=~/r"])) == tmp_path / "r"


@pytest.mark.parametrize("words",
                         [["run.seed=1,2", "run.name=a b"], ["optim.betas=0.9,0.95"],
                          ["loss=z,micro_balance"],
                                   ["router=topk,sigmoid"], ["model.top_k=2,4"]])
def test_the_advice_about_several_values_works(words: list[str], capsys: pytest.CaptureFixture,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    (code, advice), *rest = errors_of("experiment=debug", *words)
    assert (code, rest) == ("E-CONFIG-012", [])
    started: list[list[str]] = []
    monkeypatch.setattr("moetrain.cli.train.run_command", lambda words, program: started.append(words) or 0)
    for line in advice.splitlines():
        typed = shlex.split(line.strip().removeprefix("or "))
        if typed[0] == "moetrain":
            assert main(typed[1:]) == 0 and len(started) == 2
        else:
            compose(typed)


@pytest.mark.parametrize("typed, code",
                         [("modle.dim=3,4", "E-CONFIG-003"), ("foo=1,2", "E-CONFIG-003"),
                          ("router.bias_rate=1,2", "E-CONFIG-012"),
                                         ("data.weights.code=1,2", "E-CONFIG-012")])
def test_several_values_of_a_key_that_there_is_not_are_no_sweep(typed: str, code: str) -> None:
    assert [found for found, _ in errors_of(typed)] == [code]
