"""Configs that a run or a checkpoint recorded: data from somewhere, perhaps of another release."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetrain import __version__
from moetrain.checkpoint.records import Manifest
from moetrain.config.compose import compose, for_run, from_yaml
from moetrain.config.values import as_tree
from moetrain.errors import CheckpointError, ConfigErrors
from moetrain.runs.completion import config_of, trained_config

EVIL = [("capacity", {"_target_": "moetrain.comm.exchange.backends._package", "package": "evilmod",
                      "name": "x"}),
        ("router", {"_target_": "moetrain.__main__.main", "argv": ["version"]}),
        ("loss", {"z": {"_target_": "os.system", "command": "touch hit"}})]


def record(folder: Path, values: dict[str, Any], wrote: str = "9.9") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "env.json").write_text(json.dumps({"moetrain": wrote}))
    return folder


def readers(folder: Path, values: dict[str, Any], wrote: str = "9.9") -> dict[str, Any]:
    """Everything that reads a recorded config, by what it reads."""
    record(folder, values, wrote)
    manifest = Manifest({"config": values, "moetrain": wrote}, {"step": 1, "tokens": 1}, {}, block=1)
    return {"config.yaml": lambda: from_yaml(folder / "config.yaml"),
            "run": lambda: for_run([f"run.dir={folder}"]),
            "resumed": lambda: trained_config(folder, folder / "checkpoints"),
            "checkpoint": lambda: config_of(manifest, folder / "checkpoints" / "step-00000001")}


@pytest.mark.parametrize("section, part", EVIL)
def test_a_recorded_part_chooses_and_runs_nothing(section: str, part: dict, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text("open('hit', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, read in readers(tmp_path / "run", {**as_tree(compose([])), section: part}).items():
        with pytest.raises(ConfigErrors) as caught:
            read()
        (error,) = caught.value.errors
        assert error.id == "E-CONFIG-008" and "_target_" in error.where, name
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("change, key", [
    ({"optim": {"sharpness": 1}}, "optim.sharpness"), ({"telescope": {"x": 1}}, "telescope.x"),
    ({"run": {"dtype": "fp4"}}, "run.dtype"),
    ({"router": {"p": 0.4}}, "router.p"),
    ({"router": {"_target_": "moetrain.routers.telepathic.TelepathicRouter"}}, "router._target_")])
def test_another_release_is_named_with_the_key(change: dict, key: str, tmp_path: Path) -> None:
    values = as_tree(compose([]))
    for section, keys in change.items():
        values[section] = {**values.get(section, {}), **keys}
    for name, read in readers(tmp_path / "run", values).items():
        with pytest.raises(ConfigErrors) as caught:
            read()
        error = next(error for error in caught.value.errors if error.where.startswith(f"{key} in {tmp_path}"))
        assert key in error.what and "moetrain 9.9 wrote it" in error.why, name
        assert f"this is moetrain {__version__}" in error.why and "use moetrain 9.9" in error.next
        assert ("correct it in" in error.next) == (name != "checkpoint")


def test_thousands_of_strange_keys_and_a_bottomless_config_take_no_time(tmp_path: Path) -> None:
    values = {**as_tree(compose([])), **{f"strange{number}": number for number in range(3000)}}
    for read in readers(tmp_path / "run", values).values():
        with pytest.raises(ConfigErrors) as caught:
            read()
        assert len(caught.value.errors) == 20
    deep: dict = {}
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(CheckpointError, match="nested more than 32 deep"):
        config_of(Manifest({"config": deep}, {"step": 1, "tokens": 1}, {}, block=1), tmp_path)


def test_a_release_that_is_not_known_and_a_config_that_was_changed(tmp_path: Path) -> None:
    values = {**as_tree(compose([])), "x": 1}
    (tmp_path / "run").mkdir()
    for wrote, said in ((__version__, "it was changed since"), ("", "an unknown release")):
        record(tmp_path / "run", values, wrote)
        if not wrote:
            (tmp_path / "run" / "env.json").write_text("[" * 5000)
        with pytest.raises(ConfigErrors, match=said):
            from_yaml(tmp_path / "run" / "config.yaml")


def test_text_that_looks_like_a_reference_is_text(tmp_path: Path) -> None:
    values = as_tree(compose([]))
    values["generate"]["prompt"] = "echo ${HOME:-x} ${"
    record(tmp_path, values)
    assert from_yaml(tmp_path / "config.yaml").generate.prompt == "echo ${HOME:-x} ${"
