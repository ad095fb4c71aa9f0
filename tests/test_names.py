"""Names that anybody may have chosen are read, and reach neither the terminal nor a line of their own."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.config.compose import compose
from moetrain.config.rules.run import run_name
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import open_prepared
from moetrain.errors import ConfigErrors
from moetrain.train.loggers.console import Console, connect_logging, eval_line
from moetrain.train.loop import train
from tests.support.checkpoints import SMALL
from tests.support.text_file import File
from tests.support.training import TINY

NAMES = [b"caf\xe9", b"line\nbreak", b"\x1b[31mred", "中文".encode(), b"n" * 255]
DOMAINS = ["\x1b[31mred", "caf\\xe9", "line\nbreak", "n" * 255, "中文"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of a name that is not UTF-8, with a domain of each name."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9xt"))
    for number, name in enumerate(NAMES):
        domain = folder / os.fsdecode(name)
        domain.mkdir(parents=True)
        for part in range(3):
            (domain / os.fsdecode(b"f\xff\n%d.txt" % part)).write_text(f"{number} {part} words " * 200)
    return folder


def test_text_in_folders_of_any_name_is_read_and_trained_on(
        text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = prepare(path=str(text), out=tmp_path / "out", tokenizer="bytes", domain_cap=None)
    prepared = open_prepared(folder, verify=True)
    assert list(prepared.domains) == DOMAINS
    words = [word for word in TINY if not word.startswith(("model.", "data", "optim.warmup"))]
    small = [word for word in SMALL if not word.startswith("data")]
    config = compose([*words, *small, "data=text", "run.steps=1", "eval.windows=1", "eval.batch=1",
                      "checkpoint.interval=0"])
    run_dir = text.parent / os.fsdecode(b"r\xfcn")
    config = replace(config, data=replace(config.data, path=str(text)),
                     run=replace(config.run, dir=str(run_dir)))
    train(config)
    said = capsys.readouterr().out
    assert said.isprintable() or all(line.isprintable() for line in said.splitlines())
    assert "\\x1b[31mred" in said and "line\\nbreak" in said and "caf\\xe9" in said and "r\\xfcn" in said
    found = json.loads((run_dir / "eval.jsonl").read_text())
    assert {f"loss/{domain}" for domain in DOMAINS} <= set(found)


def test_what_a_run_says_stays_on_its_line_and_is_no_markup() -> None:
    stream = File()
    with Console(rank=0, steps=10, stream=stream) as console:
        console.banner([("", "moetrain"), ("data", "a\nb\x1b[2J")])
        console.line(eval_line(1, {"nats_per_byte/a\nb": 1.0, "nats_per_byte/mean": 1.0}))
        console.line("[bold]x[/bold]\x07")
        name = Path(os.fsdecode(b"/a\n[warn] forged\xe9"))
        logging.getLogger("moetrain.test").warning("left out %s and %d", name, 3)
    assert stream.getvalue().splitlines() == [
        "moetrain", "data  a\\nb\\x1b[2J",
        "[eval] step 1, nats per byte: a\\nb 1.000  mean 1.000 (1.443 bits)",
        "[bold]x[/bold]\\x07", "[warn] left out /a\\n[warn] forged\\xe9 and 3"]


def test_arguments_of_a_message_may_be_a_mapping() -> None:
    said: list[str] = []
    restore = connect_logging(said.append)
    logging.getLogger("moetrain.test").warning("%(name)s", {"name": "fine"})
    restore()
    assert said == ["[warn] fine"]


@pytest.mark.parametrize("name", ["n" * 201, "日" * 70, "a\nb", "a\x1b[31m", "\udce9"], ids=ascii)
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    config = compose(["experiment=debug"])
    (error,) = run_name(replace(config, run=replace(config.run, name=name)), 1)
    assert error.id == "E-CONFIG-021" and all(line.isprintable() for line in str(error).splitlines())


def test_a_long_name_is_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigErrors, match="E-CONFIG-021"):
        compose(["experiment=debug", f"run.name={'n' * 300}"])
