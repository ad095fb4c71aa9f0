"""bfloat16 training: float32 parameters, gradients and moments.

The same on all meshes within the spread of two seeds, and the same bits every time.
"""

import pytest
import torch

from tests.support.training import alone, difference, make_run, train_steps, union

BF16 = ["run.dtype=bfloat16", "train.micro_batch=4", "optim.lr=3e-3", "model.dim=32", "model.expert_dim=32"]
MESHES = {
    "ddp2": (2, ["parallel=ddp"]), "ep2": (2, ["parallel=ep"]), "fsdp2": (2, ["parallel=fsdp"]),
    "ep2_fsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
}
STEPS = 20


def losses(trained) -> torch.Tensor:
    return torch.tensor([metrics["loss/ce"] for metrics in trained.metrics], dtype=torch.float64)


@pytest.fixture(scope="module")
def serial():
    return {seed: alone([*BF16, f"run.seed={seed}"], STEPS) for seed in (0, 1)}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_as_one_process_does(ranks, serial, mesh):
    """Every step's loss is nearer to that of one process than another seed's, and the bits repeat."""
    world, overrides = MESHES[mesh]
    arguments = (train_steps, [*BF16, *overrides, f"run.nproc={world}"], STEPS)
    first, second = union(ranks(world).run(*arguments)), union(ranks(world).run(*arguments))
    spread = (losses(serial[0]) - losses(serial[1])).abs().mean()
    assert (losses(first) - losses(serial[0])).abs().mean() < 0.5 * spread
    assert losses(first)[-1] < losses(first)[0]
    assert (difference(first.parameters, second.parameters)[0] == 0.0
            and torch.equal(losses(first), losses(second)))


def test_what_is_kept_is_float32():
    run = make_run(BF16)
    from moetrain.train.step import train_step

    seen = []
    hook = run.state.model.layers[0].attention.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype))
    train_step(run, 1)
    hook.remove()
    assert seen and set(seen) == {torch.bfloat16}
    assert {shard.rows.dtype for shard in run.state.state_shards()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in run.state.model.parameters()} == {torch.float32}
