"""A reader yields weights layer by layer, checks what it reads, and knows the names of older releases."""

import shutil
from pathlib import Path

import pytest

from moetrain.checkpoint.manifest import read_manifest
from moetrain.errors import CheckpointError
from moetrain.transform import open_weights

OLD_RUN = Path(__file__).parents[1] / "support" / "old_run"


def test_old_names_are_read_as_the_new_ones() -> None:
    with open_weights(OLD_RUN) as source:
        assert "model.layers.0.attention.qkv.weight" in source.names
        assert source["model.layers.0.attention.qkv.weight"].shape == (32, 16)
        assert {name for name, _ in source} == set(source.names)


def test_a_reader_goes_layer_by_layer_and_finds_damage(tmp_path: Path) -> None:
    with open_weights("mine") as source:
        layers = [int(name.split(".")[2]) for name in source.names if ".layers." in name]
        assert layers == sorted(layers) and source.names[0] == "model.embed"
        assert source.names[-1] in ("model.head", "model.norm.weight")
        with pytest.raises(KeyError):
            source["model.layers.9.ffn.down.weight"]
    shutil.copytree("runs/mine", tmp_path / "bad")
    payload = next((tmp_path / "bad").glob("checkpoints/*/*.safetensors"))
    entry = read_manifest(payload.parent).entry("model.norm.weight")
    content = bytearray(payload.read_bytes())
    content[entry.chunks[0].begin] ^= 1
    payload.write_bytes(content)
    with open_weights(tmp_path / "bad") as found, pytest.raises(CheckpointError) as caught:
        list(found)
    assert "model.norm.weight" in caught.value.why
