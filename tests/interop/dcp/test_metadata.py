"""`.metadata` as torch writes it, as earlier releases did, and altered."""

import copyreg
import dataclasses
import io
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moetrain.interop.dcp.metadata import read_metadata
from moetrain.interop.dcp.pickles import PickleError
from moetrain.interop.dcp.records import StoredChunk, StoredTensor


@pytest.fixture
def metadata(tmp_path) -> Metadata:
    """Of a save: a tensor, a number, and a nested list; its path is a Path, which is pickled, too."""
    state = {"model": {"w": torch.zeros(4, 6, dtype=torch.bfloat16)}, "step": 7, "lr": [1e-3, {"x": 2}]}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    return pickle.loads((tmp_path / "saved/.metadata").read_bytes())


def place(metadata: Metadata, name: str = "model.w") -> _StorageInfo:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def test_what_torch_writes(metadata):
    tensors, others = read_metadata(pickle.dumps(metadata))
    info = place(metadata)
    chunk = StoredChunk((0, 0), (4, 6), "__0_0.distcp", info.offset, info.length)
    assert tensors == {"model.w": StoredTensor("BF16", (4, 6), (chunk,))}
    assert {"step", "lr.0"} <= others.keys()


def test_what_earlier_releases_and_other_programs_wrote(metadata):
    now = read_metadata(pickle.dumps(metadata))
    metadata.mcore_data = {"decoder.w": {"nd_reformulated_orig_global_shape": (4, 6)}}
    assert read_metadata(pickle.dumps(metadata, 5)) == now
    entry = metadata.state_dict_metadata["model.w"]
    entry.properties = OldProperties(dtype=torch.bfloat16)
    del metadata.mcore_data, metadata.storage_meta, metadata.version
    metadata.planner_data = OrderedDict(metadata.planner_data, more=defaultdict(list, a=[1]))
    content = pickle.dumps(metadata)
    assert b"sharded_tensor" in content and read_metadata(content) == now

    class ByName(pickle.Pickler):                         # enums in Python 3.11.0 to 3.11.3
        dispatch_table = copyreg.dispatch_table | {_MEM_FORMAT_ENCODING: lambda value: (
            getattr, (_MEM_FORMAT_ENCODING, value.name))}

    entry.properties = TensorProperties(dtype=torch.bfloat16)
    file = io.BytesIO()
    ByName(file, 4).dump(metadata)
    assert read_metadata(file.getvalue()) == now


class Planted:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


@dataclasses.dataclass
class Unknown:
    x: int = 0


def test_a_planted_command_and_unknown_types_are_named(metadata, tmp_path):
    metadata.planner_data["x"] = Planted(tmp_path / "canary")
    with pytest.raises(PickleError, match="builtins.exec"):
        read_metadata(pickle.dumps(metadata))
    assert not (tmp_path / "canary").exists()
    metadata.planner_data["x"] = Unknown()
    with pytest.raises(PickleError, match=f"{__name__}.Unknown"):
        read_metadata(pickle.dumps(metadata))
    metadata.planner_data = None
    metadata.state_dict_metadata["model.w"].properties.layout = torch.sparse_coo
    with pytest.raises(PickleError, match="torch.sparse_coo"):
        read_metadata(pickle.dumps(metadata))


def altered(metadata: Metadata, **fields: object) -> Metadata:
    entry = metadata.state_dict_metadata["model.w"]
    metadata.state_dict_metadata["model.w"] = dataclasses.replace(entry, **fields)
    return metadata


def chunk(offsets: object, sizes: object) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets, sizes)


@pytest.mark.parametrize("change, fault", [
    (lambda it: altered(it, chunks=[chunk(torch.Size([2, 0]), (4, 6))]), "does not lie in its shape"),
    (lambda it: altered(it, chunks=[chunk(torch.Size([0]), (4,))]), "does not lie in its shape"),
    (lambda it: altered(it, chunks=[chunk((-1, 0), (1, 6))]), "not a list of numbers"),
    (lambda it: altered(it, chunks=[chunk((1, 0), (1, 6))]), r"where its chunk at \[1, 0\]"),
    (lambda it: altered(it, chunks=None), "no list of chunks"),
    (lambda it: altered(it, size="large"), "not a list of numbers"),
    (lambda it: altered(it, properties=None), "no properties"),
    (lambda it: setattr(place(it), "offset", -5), "no file, offset and length"),
    (lambda it: setattr(place(it), "transform_descriptors", ["zstd"]), "written through zstd"),
    (lambda it: setattr(it, "storage_data", None), "none of their places"),
    (lambda it: it.storage_data.update({MetadataIndex("x"): 3}) or it.state_dict_metadata.update(
        x=it.state_dict_metadata["step"]), "holds int where"),
    (lambda it: it.state_dict_metadata.update({3: it.state_dict_metadata["step"]}), "name of a tensor"),
])
def test_contradictions_are_refused(metadata, change, fault):
    change(metadata)
    with pytest.raises(PickleError, match=fault):
        read_metadata(pickle.dumps(metadata))


def test_chunks_that_tensors_share_do_not_multiply(metadata):
    """500 tensors of one list of 500 chunks: 250,000 chunks in 40 kB."""
    entry = metadata.state_dict_metadata["model.w"]
    entry.chunks = entry.chunks * 500
    shared = TensorStorageMetadata(entry.properties, entry.size, entry.chunks)
    metadata.state_dict_metadata.update({f"w{number}": shared for number in range(500)})
    info = place(metadata)
    metadata.storage_data.update({MetadataIndex(f"w{number}", (0, 0)): info for number in range(500)})
    with pytest.raises(PickleError, match="share their chunks"):
        read_metadata(pickle.dumps(metadata))


def test_something_else_is_no_metadata():
    for value in ({}, 3, [1], "text"):
        with pytest.raises(PickleError, match="where .*Metadata belongs"):
            read_metadata(pickle.dumps(value))
