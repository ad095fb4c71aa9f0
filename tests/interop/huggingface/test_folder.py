"""Folders of public models: read as safetensors reads them, and refused where not whole or not safe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain.errors import CheckpointError, ConfigError
from moetrain.interop.huggingface.folder import INDEX, SINGLE, open_folder
from moetrain.interop.huggingface.folder_writer import FolderWriter

TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(4, 2).bfloat16(), "c": torch.randn(()),
           "d": torch.arange(7), "empty": torch.zeros(0, 3), "e": torch.randn(6, 6)}
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def written(out: Path, shard_bytes: int = 10 ** 9, tensors=TENSORS) -> Path:
    with FolderWriter(out, shard_bytes) as writer:
        writer.begin_shards({name: (KINDS[tensor.dtype], tuple(tensor.shape))
                             for name, tensor in tensors.items()})
        for name in reversed(tensors):
            writer.add(name, tensors[name])
        writer.end_shards()
        writer.write("config.json", '{"model_type": "mixtral"}')
    return out


@pytest.mark.parametrize("shard_bytes", [10 ** 9, 100, 1])
def test_what_was_written_is_read_by_us_and_by_safetensors(tmp_path, shard_bytes):
    folder = written(tmp_path / "out", shard_bytes)
    shards = sorted(folder.glob("*.safetensors"))
    theirs = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert theirs.keys() == TENSORS.keys() and len(shards) == {10 ** 9: 1, 100: 3, 1: 5}[shard_bytes]
    with open_folder(folder) as ours:
        assert set(ours.names) == TENSORS.keys() and ours.config == {"model_type": "mixtral"}
        for name, tensor in TENSORS.items():
            assert ours.shape(name) == tuple(tensor.shape) and ours.dtype(name) == KINDS[tensor.dtype]
            assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor)
        assert torch.equal(ours.rows("e", 2, 3), TENSORS["e"][2:5])
    if shard_bytes < 10 ** 9:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), FolderWriter(tmp_path / "out") as writer:
        writer.begin_shards({"a": ("F32", (3, 5))})
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "out")
    before = (tmp_path / "out" / SINGLE).read_bytes()
    with pytest.raises(ConfigError, match="of that name already"):
        written(tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_links_into_a_cache_are_followed_and_no_others(tmp_path):
    """So folders of Hugging Face's cache look: snapshots/<commit>/*.safetensors are links to blobs."""
    folder = written(tmp_path / "model" / "snapshots" / "0a1b")
    (tmp_path / "model" / "blobs").mkdir()
    for file in (SINGLE, "config.json"):
        (folder / file).rename(tmp_path / "model" / "blobs" / file)
        (folder / file).symlink_to(Path("../../blobs") / file)
    with open_folder(folder) as ours:
        assert torch.equal(ours["a"], TENSORS["a"])
    for file in (SINGLE, "config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
        (folder / file).unlink()
        (folder / file).symlink_to(tmp_path / file)
        with pytest.raises(CheckpointError) as error:
            open_folder(folder)
        assert error.value.id == "E-CHECKPOINT-026" and str(tmp_path / file) in error.value.why
        (folder / file).unlink()
        shutil.copy(tmp_path / file, folder / file)


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(path: Path, header: dict | bytes, content: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def change(name, **said):
    def damage(folder):
        header, content = header_of(folder / SINGLE)
        header[name] |= said
        with_header(folder / SINGLE, header, content)
    return damage


def cut(folder):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-4])


def doubled(folder):
    header, content = header_of(folder / SINGLE)
    text = json.dumps(header).encode()
    with_header(folder / SINGLE, text[:-1] + b"," + json.dumps({"a": header["a"]}).encode()[1:], content)


def pickled(folder):
    (folder / SINGLE).unlink()
    torch.save(TENSORS, folder / "pytorch_model.bin")


def shards_without_index(folder):
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")


def code(folder):
    (folder / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}')


def method(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')


DAMAGE = {
    "truncated": (cut, "its tensors end at"),
    "header longer than the file": (lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 20), "its header"),
    "header is no JSON": (lambda folder: with_header(folder / SINGLE, b"{]", b""), "header"),
    "header nested without end": (lambda folder: with_header(folder / SINGLE, b"[" * 200_000, b""), "header"),
    "a name twice": (doubled, "a stands in it twice"),
    "overlap": (change("e", data_offsets=[0, 144]), "begin at"),
    "wrong size": (change("a", shape=[3, 6]), "a has 60 bytes"),
    "negative length": (change("a", shape=[-3, 5]), "a: "),
    "unknown dtype": (change("a", dtype="F4"), "a is of a dtype"),
    "pickles": (pickled, "pickles (pytorch_model.bin)"),
    "no index": (shards_without_index, "no index"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
    "own code": (code, "code of its own"),
    "another quantization": (method, "quantized by awq"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_unsafe_folders_are_refused_by_name(tmp_path, name):
    damage, said = DAMAGE[name]
    folder = written(tmp_path / "out")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        open_folder(folder)
    assert said in str(error.value) and str(folder) in error.value.where


def index_of(folder) -> dict:
    return json.loads((folder / INDEX).read_text())


def moved(folder, to):
    index = index_of(folder)
    index["weight_map"]["a"] = to
    (folder / INDEX).write_text(json.dumps(index))


def lost(folder):
    index = index_of(folder)
    index["weight_map"]["z"] = index["weight_map"]["a"]
    (folder / INDEX).write_text(json.dumps(index))


def twice(folder):
    shard = folder / index_of(folder)["weight_map"]["e"]
    save_file({"a": TENSORS["a"], "e": TENSORS["e"]}, shard)


def foreign(folder):
    shutil.copy(folder / index_of(folder)["weight_map"]["a"], folder.parent / "other.safetensors")
    moved(folder, "../other.safetensors")


INDEX_DAMAGE = {
    "outside": (foreign, "../other.safetensors lies outside"),
    "absolute": (lambda folder: moved(folder, "/etc/passwd"), "/etc/passwd lies outside"),
    "no name of a file": (lambda folder: moved(folder, "a\0b"), "lies outside"),
    "no such shard": (lambda folder: moved(folder, "none.safetensors"), "cannot be opened"),
    "a tensor in no shard": (lost, "z is not in it"),
    "a tensor in two shards": (twice, "a"),
    "weight_map is a list": (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), "weight_map"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_an_index_that_is_not_true_is_refused(tmp_path, name):
    damage, said = INDEX_DAMAGE[name]
    folder = written(tmp_path / "out", 100)
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        open_folder(folder)
