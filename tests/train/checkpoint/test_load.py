"""A checkpoint restores everything to the bit; a damaged one, or one of another model, changes nothing."""

import logging
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.manifest import checkpoints_of, read_manifest
from moetrain.errors import CheckpointError
from moetrain.train.checkpoint import load as reader
from moetrain.train.checkpoint.load import load, load_newest_model, resume
from moetrain.train.step import train_step
from tests.support.checkpoints import SIZES, flip, payload, saved, tensors, trained
from tests.support.training import make_run


def test_what_is_saved_is_restored_to_the_bit(two_steps):
    run, directory = two_steps
    other = make_run([*SIZES, "run.seed=9"])
    load(other.state, directory)
    assert (other.state.step, other.state.tokens) == (2, run.state.tokens)
    truth, found = tensors(run.state), tensors(other.state)
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(found[name], tensor), name
    assert all(state["step"] == 2 for state in other.state.optimizer.state.values())


@pytest.mark.parametrize("forgotten", ["exp_avg", "exp_avg_sq", "steps", "embed"])
def test_a_forgotten_piece_of_state_gives_another_third_step(checkpoint, forgotten):
    """Negative controls, each of which the comparison of resumed and unbroken runs must detect."""
    run, whole, other = trained(2), make_run(SIZES), make_run(SIZES)
    load(whole.state, checkpoint), load(other.state, checkpoint)
    for parameter, state in other.state.optimizer.state.items():
        if forgotten in state:
            state[forgotten].zero_()
        elif forgotten == "steps":
            state["step"].fill_(1)
    if forgotten == "embed":
        other.state.model.embed.data.zero_()
    unbroken = [train_step(run, step).metrics["loss/ce"] for step in (3, 4)]
    assert [train_step(whole, step).metrics["loss/ce"] for step in (3, 4)] == unbroken
    assert [train_step(other, step).metrics["loss/ce"] for step in (3, 4)] != unbroken


def test_a_damaged_checkpoint_leaves_the_state_as_it_was(checkpoint):
    """The harm lies in what is read last: nothing may have been written by then."""
    flip(payload(checkpoint), payload(checkpoint).stat().st_size - 1)
    run = make_run([*SIZES, "run.seed=9"])
    before = tensors(run.state)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load(run.state, checkpoint)
    after = tensors(run.state)
    assert all(torch.equal(after[name], before[name]) for name in before) and run.state.step == 0


def test_verify_sizes_believes_the_content(checkpoint):
    flip(payload(checkpoint), payload(checkpoint).stat().st_size - 1)
    load(make_run(SIZES).state, checkpoint, verify="sizes")
    with payload(checkpoint).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="bytes long"):
        load(make_run(SIZES).state, checkpoint, verify="sizes")


@pytest.mark.parametrize("overrides, named", [
    (["data.vocab_size=40"], "model.embed is F32 [48, 16] in the checkpoint, F32 [40, 16] here"),
    (["run.dtype=float64"], "F32 [48, 16] in the checkpoint, F64 [48, 16] here"),           # trap 5
    (["model.num_layers=3"], "model.layers.2.attention_norm.weight is not in the checkpoint"),
    (["model.num_layers=1"], "model.layers.1.attention_norm.weight is in the checkpoint alone"),
    (["model.num_experts=4"], "model.layers.0.moe.router.weight is F32 [8, 16]"),
    (["optim=muon"], "momentum_buffer is not in the checkpoint"),
    (["model.num_shared_experts=0"], "moe.shared.down.weight is in the checkpoint alone"),
])
def test_another_model_is_refused_and_what_differs_is_named(two_steps, overrides, named):
    run = make_run([*SIZES, *overrides])
    before = tensors(run.state)
    with pytest.raises(CheckpointError) as caught:
        load(run.state, two_steps[1], mesh=run.mesh)
    assert caught.value.id == "E-CHECKPOINT-003" and named in caught.value.why
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(run.state).items())


def test_an_expert_too_many_in_the_checkpoint_is_refused(two_steps, tmp_path):
    """The router's rows would betray it; with the router alike, the experts themselves must."""
    run = make_run(SIZES)
    manifest = read_manifest(two_steps[1])
    assert manifest.entry("model.layers.0.moe.experts.7.down")
    assert not manifest.entry("model.layers.0.moe.experts.8.down")
    loading = reader.CheckpointLoader((p for p in run.state.state_shards() if ".experts.7." not in p.name),
                             two_steps[1], "full")
    left = loading.unclaimed(run.mesh)
    assert len(left) == 2 * 2 * 3 and all(".experts.7." in name for name in left)


def test_the_model_alone_needs_no_optimizer(two_steps):
    run, directory = two_steps
    other = make_run([*SIZES, "run.seed=9"])
    assert load_newest_model(other.state.model, directory.parents[1], other.mesh).path == directory
    for (name, mine), theirs in zip(run.state.model.named_parameters(), other.state.model.parameters()):
        assert torch.equal(mine, theirs), name


@pytest.fixture
def three(tmp_path: Path):
    """Checkpoints of steps 1, 2 and 3; (run directory, state after each)."""
    run, states = make_run(SIZES), {}
    for step in (1, 2, 3):
        train_step(run, step)
        states[step] = tensors(run.state)
        saved(run, tmp_path)
    return tmp_path, states


@pytest.mark.parametrize("harmed, left", [((), 3), ((3,), 2), ((2, 3), 1), ((2,), 3)])
def test_resume_takes_the_newest_good_one_and_says_what_is_lost(three, harmed, left, caplog):
    run_dir, states = three
    for step in harmed:
        path = payload(run_dir / "checkpoints" / f"step-{step:08d}")
        flip(path, path.stat().st_size // 2)
    run = make_run([*SIZES, "run.seed=9"])
    with caplog.at_level(logging.WARNING):
        found = resume(run.state, run_dir, run.mesh)
    assert (found.path.name, found.lost, run.state.step) == (f"step-{left:08d}", 3 - left, left)
    assert all(torch.equal(tensor, states[left][name]) for name, tensor in tensors(run.state).items())
    passed_over = [step for step in harmed if step > left]
    assert ([path.name for path in checkpoints_of(run_dir)]
            == [f"step-{s:08d}" for s in (1, 2, 3) if s not in passed_over])
    assert ("steps are lost" in caplog.text) == bool(passed_over)
    for step in passed_over:
        assert (run_dir / "checkpoints" / f"step-{step:08d}.damaged").is_dir()
        assert f"step-{step:08d}/rank-0000.safetensors: " in caplog.text


def test_evaluation_passes_over_damage_and_leaves_it_where_it_is(three):
    run_dir, states = three
    flip(run_dir / "checkpoints/step-00000003/manifest.json", 2000)
    run = make_run([*SIZES, "run.seed=9"])
    assert load_newest_model(run.state.model, run_dir, run.mesh).path.name == "step-00000002"
    assert torch.equal(run.state.model.embed.data, states[2]["model.embed"])
    assert len(checkpoints_of(run_dir)) == 3


def test_nothing_good_is_an_error_that_names_every_file(three):
    run_dir, _ = three
    for step, harm in ((1, "unlink"), (2, "cut"), (3, "empty")):
        path = payload(run_dir / "checkpoints" / f"step-{step:08d}")
        content = path.read_bytes()
        path.unlink()
        if harm != "unlink":
            path.write_bytes(content[:-1] if harm == "cut" else b"")
    run = make_run(SIZES)
    with pytest.raises(CheckpointError) as caught:
        resume(run.state, run_dir, run.mesh)
    assert caught.value.id == "E-CHECKPOINT-004" and caught.value.code == 13
    for step, why in ((1, "missing"), (2, "bytes long"), (3, "0 bytes long")):
        assert f"step-{step:08d}/rank-0000.safetensors: " in caught.value.why and why in caught.value.why


def test_another_model_is_no_reason_to_take_an_older_checkpoint(three):
    run_dir, _ = three
    run = make_run([*SIZES, "data.vocab_size=40"])
    with pytest.raises(CheckpointError, match="E-CHECKPOINT-003"):
        resume(run.state, run_dir, run.mesh)
    assert len(checkpoints_of(run_dir)) == 3


def test_no_checkpoint_is_none(tmp_path):
    run = make_run(SIZES)
    assert resume(run.state, tmp_path, run.mesh) is None
