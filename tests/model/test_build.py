"""The model as it starts: the same numbers on any mesh, from the seed and the names alone."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.start import Place, normal
from tests.support.training import Held, alone, make_run, snapshot, whole


def held(overrides: list[str]) -> Held:
    return snapshot(make_run(overrides), lambda parameter: parameter.data)


def initial(overrides: list[str]) -> dict[str, Tensor]:
    return whole([held(overrides)])


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["ep", "fsdp", "ep_fsdp"])
def test_two_ranks_start_from_the_numbers_of_one(ranks, mode):
    single = initial([])
    parts = ranks(2).run(held, [f"parallel={mode}", "run.nproc=2", "train.micro_batch=8"])
    assert not any(name.startswith("layers.0.moe.experts.7.") for name in parts[0])
    together = whole(parts)
    assert set(together) == set(single)
    for name, tensor in together.items():
        assert torch.equal(tensor, single[name]), name


def test_a_tensor_depends_on_the_seed_and_its_name_and_nothing_else():
    start, again, fewer, other = (initial(o) for o in ([], [], ["model.num_experts=4"], ["run.seed=1"]))
    for name, tensor in start.items():
        assert torch.equal(tensor, again[name])
        assert "norm" in name or not torch.equal(tensor, other[name]), name
    for name in fewer.keys() & start.keys():
        assert name.endswith("router.weight") or torch.equal(fewer[name], start[name]), name


def test_no_two_tensors_share_their_numbers():
    firsts = [tensor.flatten()[0].item() for name, tensor in initial([]).items() if "norm" not in name]
    assert len(set(firsts)) == len(firsts)


def test_norms_are_one_and_residual_writers_are_smaller():
    start = initial(["model.dim=64", "model.qk_norm=head", "model.num_shared_experts=1"])
    norms = {name: tensor for name, tensor in start.items() if "norm" in name}
    assert {name.rpartition("layers.0.")[2] for name in norms if "layers.0" in name} == {
        "attention_norm.weight", "ffn_norm.weight", "attention.q_norm.weight", "attention.k_norm.weight"}
    assert all((tensor == 1).all() for tensor in norms.values())
    for name, tensor in start.items():
        if name not in norms:
            writes = name.removesuffix(".weight").endswith((".out", ".down"))
            std = 0.2 / 2 if writes else 0.2             # sqrt(2 * 2 layers) = 2
            assert tensor.std().item() == pytest.approx(std, rel=0.15), name
            assert abs(tensor.mean().item()) < 5 * std / tensor.numel() ** 0.5, name


def drawn_normal(name: str, shape: tuple[int, ...]) -> Tensor:
    start = torch.empty(shape)
    normal(1.0).fill(start, Place(name, shape, 0, seed=0, std=0.2, num_layers=2))
    return start


def test_projections_start_as_the_bare_matrices_that_they_were():
    start = initial(["model.num_shared_experts=1"])
    for matrix in ("attention.qkv", "attention.out", "moe.shared.gate_up", "moe.shared.down"):
        std = 0.2 / 2 if matrix in ("attention.out", "moe.shared.down") else 0.2
        tensor = start[f"layers.1.{matrix}.weight"]
        drawn = drawn_normal(f"layers.1.{matrix}", tuple(tensor.shape))
        assert torch.equal(tensor, drawn * std), matrix


def test_the_numbers_of_a_name_never_change():
    """Whoever changes these starts every recorded run anew."""
    start = drawn_normal("embed", (3,))
    torch.testing.assert_close(start, torch.tensor([-0.070477, 0.878014, -0.340635]), rtol=0, atol=1e-6)


def test_a_bfloat16_run_keeps_float32_parameters_gradients_and_moments():
    run = make_run(["run.dtype=bfloat16"])
    assert run.state.model.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in run.state.model.parameters())
    trained = alone(["run.dtype=bfloat16"], 2)
    for tensors in (trained.parameters, trained.gradients):
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    start = initial(["run.dtype=bfloat16"])
    moved = trained.parameters["layers.0.attention.qkv.weight"] - start["layers.0.attention.qkv.weight"]
    assert moved.any() and not torch.equal(trained.parameters["embed"],
                                           trained.parameters["embed"].bfloat16().float())


@pytest.mark.parametrize("dtype, storage", [("float32", torch.float32), ("float64", torch.float64)])
def test_other_runs_store_what_they_compute_in(dtype, storage):
    assert all(tensor.dtype == storage for tensor in initial([f"run.dtype={dtype}"]).values())


def test_layers_may_differ_in_experts_and_the_first_may_be_dense():
    run = make_run(["model.num_experts=[4,8]", "model.top_k=[1,2]", "balance.weight=0.1",
                    "router.weights=raw"])
    assert run.state.model.num_choices == {"layers.0.moe": 4, "layers.1.moe": 8}
    dense = initial(["model.first_dense_layers=1", "model.tie_embeddings=true"])
    # top_k * expert_dim, gate and up
    assert dense["layers.0.ffn.gate_up.weight"].shape == (2 * 2 * 16, 16)
    assert ("head" not in dense and "layers.1.moe.router.weight" in dense
            and "layers.0.moe.router.weight" not in dense)
