"""A yaml file from a stranger: bounded before it is parsed, plain values only, and read as Hydra reads it."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moetrain.config.groups import config_dir
from moetrain.config.yaml_file import MOST_BYTES, load
from moetrain.errors import ConfigErrors

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n" for before,
    after in zip("abcdefghi", "bcdefghij"))
CHAIN = f"a0: &a0 {'[' * 20}{']' * 20}\n" + "".join(f"a{n}: &a{n} {'[' * 20}*a{n - 1}{']' * 20}\n"
                                                    for n in range(1, 100))


@pytest.mark.parametrize("text, why", [
    (BOMB, "more than 20,000 values"), ("a: &a [*a]", "refers to itself"),
    ("a: &a {b: {c: [*a]}}", "refers to itself"),
    ("a: " + "[" * 2000, "more than 32 deep"),
    ("\n".join(" " * depth + "a:" for depth in range(200)), "more than 32 deep"),
    (CHAIN, "more than 32 deep"), ("a: " + "x" * MOST_BYTES, "longer than"),
    ("a: [" + "1," * 25_000, "more than 20,000 values"),
    ("a: " + "9" * 5000, "4300 digits"), ("a: *b", "undefined alias"), ("a: 1\na: 2", "duplicate key"),
    ("a: !!python/object/apply:os.system ['true']", "tag"),
    ("a: !!python/object/apply:pathlib.PosixPath ['x']", "is a PosixPath"),
    ("a: !!set {x}", "is a set"), ("1: 2", "the key 1 is not text"), ("? [x]\n: y", "unhashable"),
    ("a: 1\n---\nb: 2", "single document"),
    ("- x", "no mapping"), ("", "no mapping"), ("a: 'x", "quoted scalar"), ("a: \x00", "special characters"),
    (b"a: \xe9", "utf-8")])
def test_what_is_no_config_is_refused_with_its_reason(text: str | bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigErrors) as caught:
        load(path)
    (error,) = caught.value.errors
    assert error.id == "E-CONFIG-017" and why in error.why and error.where == str(path)
    assert len(str(error)) < 1000


def test_files_are_read_as_hydra_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: 1e-3\nb: 2001-01-01\nc: off\nd: '${a}'\n"
                    "e: &e {f: [1, null]}\ng: *e\nh: {<<: *e, i: .5}\n")
    for file in [path, *config_dir().rglob("*.yaml")]:
        tree = load(file)
        assert tree == OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    tree = load(path)
    assert tree["e"] == tree["g"] and tree["e"]["f"] is not tree["g"]["f"]      # an alias is a copy


def test_a_reference_in_a_reference_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"a: '{'${' * 20_000}'")                # minutes in the parser of references
    assert load(path)["a"].startswith("${${")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigErrors, match="named pipe"):
        load(tmp_path / "config.yaml")
