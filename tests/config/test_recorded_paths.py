"""Paths of a run are recorded absolute; what a resumed run may not change is compared as such."""

from pathlib import Path

import pytest

from moetrain.config.compose import compose
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.resumed import resume_conflicts

TEXT = ["data=text", "data.path=corpus", "data.held_out=valid", "data.cache=kept/prepared",
        "data.tokenizer=tokenizer.json"]


def recorded(*overrides: str):
    return with_absolute_paths(compose([*overrides, "log.wandb=off"]))


def test_every_path_of_the_data_is_absolute_and_nothing_else_changes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = recorded(*TEXT).data
    assert [data.path, data.held_out, data.cache, data.tokenizer] == [
        str(tmp_path / name) for name in ("corpus", "valid", "kept/prepared", "tokenizer.json")]
    assert recorded("data=text").data == compose(["data=text"]).data
    assert recorded(*TEXT, "data.path=/far/corpus").data.path == "/far/corpus"
    assert with_absolute_paths(recorded(*TEXT)) == recorded(*TEXT)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert recorded("data=text", "data.path=link").data.path == str(tmp_path / "link")


def test_the_paths_of_a_blend_are_absolute_and_its_weights_stay(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my data").mkdir()
    monkeypatch.chdir(tmp_path / "my data")
    here = tmp_path / "my data"
    for typed, paths in (("0.7 a 0.3 b/c", ["0.7", f"'{here}/a'", "0.3", f"'{here}/b/c'"]),
                         ("a '/far off/b'", [f"'{here}/a'", "'/far off/b'"]),
                         ("7", [f"'{here}/7'"])):
        assert recorded("data=megatron", f"data.path={typed}").data.path == " ".join(paths)
    assert recorded("data=megatron", "data.path=a 'b").data.path == "a 'b"
    (here / "two words.idx").touch()  # one dataset, whose name holds a space
    assert recorded("data=megatron", "data.path=two words").data.path == f"{here}/two words"
    monkeypatch.setenv("HOME", "/home/me")
    assert recorded("data=megatron", "data.path=/a ~/b").data.path == "/a /home/me/b"


def test_a_resumed_run_is_about_the_same_path_however_it_is_typed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    old = recorded("data=text", "data.path=corpus")
    same = lambda *words: [error.where
                           for error in resume_conflicts(old, compose(["data=text", *words]))]  # noqa: E731
    assert same("data.path=corpus") == same(f"data.path={tmp_path}/corpus") == []
    assert same("data.path=other/../corpus") == []
    assert same("data.path=other") == same() == ["data.path"]
    assert same("data.path=corpus", "data.tokenizer=tokenizer.json") == ["data.tokenizer"]
    (tmp_path / "corpus").rename(tmp_path / "other/corpus")  # its fingerprint decides, when it has been read
    assert same("data.path=other/corpus") == [] and same() == ["data.path"]
