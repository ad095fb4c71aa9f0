"""Folders of torch.distributed.checkpoint that real ranks saved, and what is said of damaged ones."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from moetrain.errors import CheckpointError
from moetrain.interop.dcp import folder as folder_module
from moetrain.interop.dcp.folder import open_stored
from moetrain.interop.dcp.records import METADATA, is_stored


class Experts(nn.Module):
    """Five experts, so that two ranks hold unlike numbers, and a router."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1 = nn.Parameter(torch.randn(5, 4, 6, dtype=torch.bfloat16))
        self.gate = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))          # no row for the second rank


def save_in_every_way(folder: Path) -> None:
    """Called by two ranks: experts sharded by ep and by FSDP2, a tensor in four blocks."""
    mesh = init_device_mesh("cpu", (2,))
    rank = mesh.get_rank()
    torch.manual_seed(rank)
    mine = torch.arange(48.0).reshape(2, 4, 6) + 100 * rank
    sharded = DTensor.from_local(mine, mesh, [Shard(0)])
    columns = DTensor.from_local(torch.full((3, 2), float(rank), dtype=torch.float64), mesh, [Shard(1)])
    same = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
    dcp.save({"experts": sharded, "columns": columns, "same": same, "step": 3}, checkpoint_id=folder / "ep")
    model = fully_shard(Experts(), mesh=mesh)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "fsdp")
    dcp.save({"layers.0.moe.router.weight": torch.ones(4, 6), "layers.0.moe.experts.w1": mine},
             checkpoint_id=folder / "lost")


@pytest.fixture(scope="module")
def folders(ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(save_in_every_way, folder)
    return folder


@pytest.mark.ranks
def test_experts_of_all_ranks_are_read(folders):
    with open_stored(folders / "ep") as folder:
        first = np.arange(48, dtype="f4").reshape(2, 4, 6)
        expected = np.concatenate([first, first + 100])
        np.testing.assert_array_equal(folder.read("experts").view("f4"), expected)
        np.testing.assert_array_equal(folder.read("experts", 1, 2).view("f4"), expected[1:3])
        np.testing.assert_array_equal(folder.read("columns").view("f8"), [[0, 0, 1, 1]] * 3)
        assert folder.shape("same") == (2,) and folder.dtype("columns") == "F64" and "step" in folder.others
        assert not [fault for name in folder.tensors for fault in folder.check_content(name, print)]


@pytest.mark.ranks
def test_fsdp_shards_are_read(folders):
    model = Experts()
    with open_stored(folders / "fsdp") as folder:
        for name, tensor in model.state_dict().items():
            assert folder.read(f"model.{name}").tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.ranks
def test_plain_tensors_of_one_name_are_those_of_one_rank(folders):
    """What the check of experts is for: DCP saves no error, and half of the experts."""
    with open_stored(folders / "lost") as folder:
        assert folder.shape("layers.0.moe.experts.w1") == (2, 4, 6)


@pytest.fixture
def saved(tmp_path) -> Path:
    dcp.save({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}, checkpoint_id=tmp_path / "one",
             no_dist=True)
    return tmp_path / "one"


def altered(folder: Path, change) -> Path:
    """The folder with another `.metadata`."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    return folder


def info(metadata, name):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def fault(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error, open_stored(folder) as opened:
        for name in opened.tensors:
            opened.read(name)
    assert error.value.code == 13
    return str(error.value)


def test_truncated_missing_and_foreign_files_are_named(saved):
    data = saved / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "E-CHECKPOINT-032" in fault(saved) and "truncated" in fault(saved)
    data.write_bytes(bytes(len(content)))
    assert "no archive of torch.save" in fault(saved)
    data.unlink()
    assert "__0_0.distcp" in fault(saved) and "each rank writes its own" in fault(saved)
    (saved / METADATA).write_bytes(b"rubbish")
    assert "E-CHECKPOINT-031" in fault(saved)


def test_a_link_out_of_the_folder_is_not_followed_and_one_of_a_cache_is(saved, tmp_path):
    data = saved / "__0_0.distcp"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    assert "E-CHECKPOINT-033" in fault(saved)
    snapshot = tmp_path / "models--x/snapshots/1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x/blobs").mkdir()
    for name, blob in ((METADATA, saved / METADATA), (data.name, tmp_path / "elsewhere")):
        blob.rename(tmp_path / "models--x/blobs" / name.strip("."))
        (snapshot / name).symlink_to(Path("../../blobs") / name.strip("."))
    with open_stored(snapshot) as folder:
        assert folder.read("b").view("f4").tolist() == [1] * 5


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_MOST_OPEN", 2)
    for number in range(5):
        save_file({f"t{number}": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    with open_stored(tmp_path) as folder:
        for number in (0, 4, 2, 0):
            assert folder.read(f"t{number}").view("f4").tolist() == [number] * 2
        assert len(folder._descriptors) == 2


def test_an_altered_value_differs_from_its_checksum(saved):
    data = saved / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.index(np.float32(7).tobytes() + np.float32(8).tobytes())] ^= 1
    data.write_bytes(content)
    with open_stored(saved) as folder:
        assert "a at [0, 0] does not match" in list(folder.check_content("a", lambda count: None))[0]


def _half(metadata) -> None:
    chunks = metadata.state_dict_metadata["a"].chunks
    chunks[0].sizes = torch.Size([2, 4])


def _bytes_of_b(metadata) -> None:
    a, b = info(metadata, "a"), info(metadata, "b")
    a.offset, a.length = b.offset, b.length


@pytest.mark.parametrize("change, words", [
    (_half, "E-CHECKPOINT-034  a is not whole|[2:3, 0:4] is missing"),
    (_bytes_of_b, "E-CHECKPOINT-032|lie in the same bytes"),
    (lambda it: setattr(info(it, "a"), "relative_path", "../x.distcp"), "E-CHECKPOINT-033|../x.distcp"),
    (lambda it: setattr(info(it, "a"), "relative_path", "/etc/passwd"), "E-CHECKPOINT-033|/etc/passwd"),
    (lambda it: setattr(info(it, "a"), "offset", 1 << 40), "E-CHECKPOINT-032|truncated"),
    (lambda it: setattr(it.state_dict_metadata["a"].properties, "dtype", torch.int32), "it is F32 [3, 4]"),
])
def test_what_metadata_cannot_say(saved, change, words):
    text = fault(altered(saved, change))
    assert all(word in text for word in words.split("|"))


def test_a_planted_command_in_a_data_file_is_named_and_not_run(saved, tmp_path):
    canary, planted = tmp_path / "canary", tmp_path / "planted"
    code = f"open({str(canary)!r}, 'w').close()"
    torch.save(_Planted(code), planted)
    (saved / "__0_0.distcp").write_bytes(planted.read_bytes())

    def point_there(metadata) -> None:
        del metadata.state_dict_metadata["b"]
        metadata.storage_data = {index: place for index, place in metadata.storage_data.items()
                                 if index.fqn == "a"}
        info(metadata, "a").offset, info(metadata, "a").length = 0, planted.stat().st_size

    assert "builtins.exec" in fault(altered(saved, point_there)).replace("__builtin__", "builtins")
    assert not canary.exists()


class _Planted:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def test_kinds_of_folders(saved, tmp_path):
    assert is_stored(saved) and not is_stored(tmp_path)
    shutil.rmtree(saved)
    assert not is_stored(saved)
