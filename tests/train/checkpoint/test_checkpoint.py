"""A checkpoint restores everything to the bit, and one that cannot be trusted is refused by name."""

import json
import zlib
from pathlib import Path

import pytest
import torch

from moetrain.errors import CheckpointError
from moetrain.train.checkpoint.manifest import Manifest, newest, read_manifest
from moetrain.train.checkpoint.reader import load
from moetrain.train.checkpoint.writer import save
from moetrain.train.step import train_step
from tests.integration.training import make_run


@pytest.fixture
def saved(tmp_path: Path):
    """(run, directory) after two steps."""
    run = make_run(["model.num_shared_experts=1"])
    for step in (1, 2):
        train_step(run, step)
    return run, save(run.state, tmp_path, run.mesh, {})


def state_of(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.tensors()}


def test_what_is_saved_is_restored_to_the_bit(saved):
    run, directory = saved
    other = make_run(["model.num_shared_experts=1", "run.seed=9"])
    load(other.state, directory)
    assert (other.state.step, other.state.tokens) == (2, run.state.tokens)
    for name, tensor in state_of(run).items():
        assert torch.equal(dict(other.state.tensors())[name], tensor), name
    assert all(state["step"] == 2 for state in other.state.optimizer.state.values())


def test_every_tensor_of_the_run_has_its_global_name(saved):
    run, directory = saved
    names = set(read_manifest(directory).tensors)
    moved = sum(p.numel() for p in run.state.model.parameters())
    sizes = {n: torch.Size(e.shape).numel() for n, e in read_manifest(directory).tensors.items()}
    assert sum(size for name, size in sizes.items() if name.startswith("model.")) == moved
    assert {"model.embed", "model.layers.1.moe.experts.7.gate_up", "optim.layers.0.moe.experts.3.down.exp_avg_sq",
            "model.layers.0.moe.shared.down", "optim.layers.1.attention.qkv.exp_avg"} <= names


@pytest.mark.parametrize("forgotten", ["exp_avg", "exp_avg_sq", "steps", "embed"])
def test_a_forgotten_piece_of_state_gives_another_third_step(saved, forgotten):
    """Negative controls: the comparison of resumed and unbroken runs can see each of them."""
    run, directory = saved
    whole, other = make_run(["model.num_shared_experts=1"]), make_run(["model.num_shared_experts=1"])
    load(whole.state, directory), load(other.state, directory)
    for parameter, state in other.state.optimizer.state.items():
        if forgotten in state:
            state[forgotten].zero_()
        elif forgotten == "steps":
            state["step"].zero_()
    if forgotten == "embed":
        other.state.model.embed.data.zero_()
    unbroken = [train_step(run, step).metrics["loss/ce"] for step in (3, 4)]
    assert [train_step(whole, step).metrics["loss/ce"] for step in (3, 4)] == unbroken
    assert [train_step(other, step).metrics["loss/ce"] for step in (3, 4)] != unbroken


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def payload(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


@pytest.mark.parametrize("harm, named", [
    (lambda d: flip(payload(d), -1), "rank-0000.safetensors"),
    (lambda d: flip(payload(d), payload(d).stat().st_size // 2), "rank-0000.safetensors"),
    (lambda d: flip(d / "manifest.json", 400), "manifest.json"),
    (lambda d: flip(d / "manifest.json", 3), "manifest.json"),
    (lambda d: payload(d).write_bytes(payload(d).read_bytes()[:-8]), "rank-0000.safetensors"),
    (lambda d: payload(d).unlink(), "rank-0000.safetensors"),
    (lambda d: (d / "manifest.json").write_text("{}"), "manifest.json"),
    (lambda d: (d / "manifest.json").write_bytes(b""), "manifest.json"),
])
def test_harm_is_found_and_the_file_named(saved, harm, named):
    run, directory = saved
    harm(directory)
    with pytest.raises(CheckpointError) as caught:
        load(run.state, directory)
    assert named in caught.value.where and caught.value.code == 13


@pytest.mark.parametrize("edit", [
    lambda m: m.files.update({"../outside": 1}),
    lambda m: m.files.update({"/etc/passwd": 1}),
    lambda m: m.tensors.pop("model.embed"),
    lambda m: m.tensors.update({"model.embed": m.tensors["model.head"]._replace(shape=(1,))}),
    lambda m: m.tensors.update({"model.embed": m.tensors["model.embed"]._replace(dtype="F64")}),
])
def test_a_manifest_that_lies_is_refused(saved, edit):
    run, directory = saved
    manifest = read_manifest(directory)
    edit(manifest)
    (directory / "manifest.json").write_bytes(manifest.encode())
    with pytest.raises(CheckpointError):
        load(run.state, directory)


def test_an_unknown_version_is_refused(saved):
    _, directory = saved
    body = json.dumps({**json.loads(Manifest().encode().split(b"\n")[1]), "version": 99}).encode()
    (directory / "manifest.json").write_bytes(b"%08x\n%b" % (zlib.crc32(body), body))
    with pytest.raises(CheckpointError, match="version 99"):
        read_manifest(directory)


def test_what_an_interrupted_save_left_is_not_a_checkpoint_and_is_replaced(saved, tmp_path):
    run, directory = saved
    half = tmp_path / "checkpoints/step-00000003.tmp"
    half.mkdir()
    (half / "index-0007.json").write_text("rubbish")
    assert newest(tmp_path) == directory
    train_step(run, 3)
    assert newest(tmp_path) == directory
    assert save(run.state, tmp_path, run.mesh, {}) == newest(tmp_path) != directory
    assert not half.exists()
    load(run.state, newest(tmp_path))
