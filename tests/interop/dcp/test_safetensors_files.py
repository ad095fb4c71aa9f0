"""Folders of safetensors: of Hugging Face, and of torch's storage for it, shard by shard."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moetrain.errors import CheckpointError
from moetrain.interop.dcp.folder import open_stored
from moetrain.interop.dcp.safetensors_files import INDEX


def save_sharded(folder: Path) -> None:
    """Called by two ranks."""
    mesh = init_device_mesh("cpu", (2,))
    mine = DTensor.from_local(torch.full((2, 3), float(mesh.get_rank())), mesh, [Shard(0)])
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save({"w": mine}, storage_writer=writer)


@pytest.mark.ranks
def test_shards_of_ranks_are_one_tensor(ranks, tmp_path):
    ranks(2).run(save_sharded, tmp_path)
    with open_stored(tmp_path) as folder:
        assert folder.kind == "safetensors" and len(folder.tensors["w"].chunks) == 2
        np.testing.assert_array_equal(folder.read("w").view("f4")[:, 0], [0, 0, 1, 1])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two files, and an index."""
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    return tmp_path


def write_index(folder: Path, **files: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def test_tensors_of_two_files(folder):
    with open_stored(folder) as opened:
        np.testing.assert_array_equal(opened.read("a", 1, 1).view("f4"), [[3, 4, 5]])
        assert opened.read("b").tobytes() == b"\x80\x3f" * 4


def fault(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_stored(folder)
    return str(error.value)


def test_files_and_index_that_contradict_each_other_are_named(folder):
    first, second = sorted(folder.glob("*.safetensors"))
    write_index(folder, a=first.name)
    assert "b is not in it" in fault(folder)
    write_index(folder, a=second.name, b=second.name)
    assert "it says that a lies in" in fault(folder)
    write_index(folder, a="../" + first.name)
    assert "E-CHECKPOINT-033" in fault(folder)
    (folder / INDEX).write_text("[" * 5000)
    assert "it is no index" in fault(folder)
    (folder / INDEX).unlink()
    save_file({"a": torch.zeros(2, 3)}, folder / "zero.safetensors")
    assert "[0:2, 0:3] is there twice" in fault(folder)
    save_file({"a": torch.zeros(5)}, folder / "zero.safetensors")
    assert "hold different tensors of this name" in fault(folder)


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("content, words", [
    (b"", "no safetensors header"),
    (header(b"[]"), "no JSON object"),
    (header(b"{"), "no safetensors header"),
    ((1 << 60).to_bytes(8, "little"), "is said to have"),
    (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "truncated"),
    (header({"a": {"dtype": "F32", "shape": [1 << 40] * 2, "data_offsets": [0, 8]}}), "8 bytes are not F32"),
    (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}), "dtype F4"),
    (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}), "no list of sizes"),
    (header({"a": 3}), "no safetensors header"),
    (header({"__metadata__": {"DCP_SHARDING_INFO": "{"}}), "no safetensors header"),
])
def test_headers_that_lie_are_refused(tmp_path, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert words in fault(tmp_path) and "E-CHECKPOINT-032" in fault(tmp_path)
