"""Muon updates every matrix as torch's own does, however layers store it, and on every mesh."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.train.checkpoint.load import load
from moetrain.train.checkpoint.save import save
from moetrain.train.optim.muon import matrix_rows, orthogonalize
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.training import Trained, alone, difference, make_run, train_steps, union

MUON = ["optim=muon", "optim.muon_lr=0.02", "optim.lr=0.01", "optim.warmup=2"]
ALL_LAYERS = [*MUON, "model.num_layers=3", "model.first_dense_layers=1", "model.num_shared_experts=1",
              "model.expert_dim=12", "model.qk_norm=head"]


def hidden_parts(run: Run) -> dict[str, Tensor]:
    """Cut out every matrix of the hidden layers: 4 query heads, 2 key and 2 value heads of width 4."""
    parts = {}
    for name, parameter in run.state.model.named_parameters():
        name = name.removesuffix(".weight")
        kind = name.rpartition(".")[2]
        if kind == "qkv":
            parts |= {f"{name}/q": parameter[:16], f"{name}/k": parameter[16:24], f"{name}/v": parameter[24:]}
        elif kind == "out" or kind == "down" and parameter.ndim == 2:
            parts[name] = parameter
        elif kind == "down":
            parts |= {f"{name}/{expert}": parameter[expert] for expert in range(8)}
        elif kind == "gate_up":
            half = parameter.shape[-2] // 2
            for expert, both in enumerate(parameter if parameter.ndim == 3 else [parameter]):
                parts |= {f"{name}/{expert}/gate": both[:half], f"{name}/{expert}/up": both[half:]}
    return parts


def gradients(run: Run) -> dict[str, Tensor]:
    """The same parts of the gradients, by exchanging the storage for a moment."""
    kept = {parameter: parameter.data for parameter in run.state.model.parameters()}
    for parameter in kept:
        parameter.data = parameter.grad
    parts = {name: part.detach().clone() for name, part in hidden_parts(run).items()}
    for parameter, data in kept.items():
        parameter.data = data
    return parts


def test_every_parameter_is_stepped_once_hidden_matrices_by_muon_and_the_rest_by_adamw():
    run = make_run(ALL_LAYERS)
    optimizer, names = run.state.optimizer, {id(p): name for name, p in run.state.model.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert sorted(sum(map(list, groups.values()), [])) == sorted(names.values())
    by_adamw = {names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert by_adamw == groups["undecayed"] | groups["router"] == {
        name for name in names.values() if "norm" in name or "router" in name or name in ("embed", "head")}
    for parameter, state in optimizer.state.items():
        muon = names[id(parameter)] not in by_adamw
        assert set(state) == ({"momentum_buffer"} if muon else {"exp_avg", "exp_avg_sq", "step"})
        assert all(moment.shape == parameter.shape for name, moment in state.items() if name != "step")


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_three_steps_are_those_of_torchs_muon_on_matrices_that_stand_alone(adjust):
    run = make_run(
        [*ALL_LAYERS, f"optim.muon_adjust={adjust}", "optim.expert_lr_scale=0.5", "optim.weight_decay=0.3",
                    "optim.muon_momentum=0.9", "optim.muon_ns_steps=4", "optim.muon_precision=bfloat16"])
    copies = {name: torch.nn.Parameter(part.detach().clone()) for name, part in hidden_parts(run).items()}
    truth = torch.optim.Muon(
        [{"params": [copy], "expert": ".bank." in name} for name, copy in copies.items()],
                             momentum=0.9, weight_decay=0.3, adjust_lr_fn=adjust, ns_steps=4)
    for step in (1, 2, 3):
        rate = train_step(run, step).metrics["lr"]
        for group, gradient in zip(truth.param_groups, gradients(run).values()):
            group["lr"] = rate * (0.02 / 0.01) * (0.5 if group["expert"] else 1.0)
            group["params"][0].grad = gradient
        truth.step()
    parts = hidden_parts(run)
    for name, part in parts.items():
        torch.testing.assert_close(part.detach(), copies[name].detach(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("rows, columns", [(6, 6), (9, 4), (4, 9), (1, 5)])
def test_orthogonalizing_runs_the_polynomial_on_singular_values_and_keeps_their_vectors(rows, columns):
    x = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalize(x, 5), left @ torch.diag_embed(values) @ right)
    assert not orthogonalize(torch.zeros_like(x), 5).any()


def test_rows_follow_the_layers_sizes():
    model = make_run([*ALL_LAYERS, "model.head_dim=6"]).state.model
    rows = {name: matrix_rows(model)[p] for name, p in model.named_parameters() if p in matrix_rows(model)}
    assert rows["layers.0.attention.qkv.weight"] == [24, 12, 12]
    assert rows["layers.0.ffn.gate_up.weight"] == [24, 24]
    assert rows["layers.1.moe.shared.gate_up.weight"] == [12, 12]
    assert rows["layers.1.moe.experts.bank.gate_up"] == [12, 12] and len(rows) == 3 + 1 + 2 * 2


# Sequences of one token: attention gives back the value, so the gradients of query and key rows are zero but
# for rounding, as experts have it whose tokens cancel. Ten iterations would make 2e5 times as much of it.
ONE_TOKEN = [*MUON, "train.seq_len=1", "optim.muon_ns_steps=10", "optim.weight_decay=0"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_gradients_that_are_rounding_alone_move_nothing(dtype):
    run = make_run([*ONE_TOKEN, f"run.dtype={dtype}"])
    before = {name: part.detach().clone() for name, part in hidden_parts(run).items()}
    noise = 0.0
    for step in (1, 2, 3):
        train_step(run, step)
        noise = max(noise, *(part.abs().max().item() for name, part in gradients(run).items()
                             if name[-2:] in ("/q", "/k")))
    # The test would show nothing with exact zeros, which some CPUs' instructions for bfloat16 give.
    assert noise < 1e-7 and (noise > 0 or dtype == "bfloat16")
    still = {name for name, part in hidden_parts(run).items() if torch.equal(part, before[name])}
    assert still == {f"layers.{layer}.attention.qkv/{rows}" for layer in (0, 1) for rows in "qk"}


def test_rounding_is_measured_by_all_gradients_and_small_matrices_beside_large_ones_are_moved():
    x_MAB = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_MAB *= torch.tensor([1.0, 1e-12, 1e-17]).view(3, 1, 1)
    # 1e7 lifts the norms above 1e-7, below which they are clamped before the division.
    whole_MAB = orthogonalize(x_MAB * 1e7, 5)
    floored_MAB = orthogonalize(x_MAB * 1e7, 5, floor=2e-16 * 1e7)
    assert torch.equal(floored_MAB[:2], whole_MAB[:2]) and whole_MAB[2].any() and not floored_MAB[2].any()
    assert orthogonalize(torch.full((1, 2, 2), float("nan")), 5, floor=1.0).isnan().all()


FORCED = {"layers.0.moe": [0, 1], "layers.1.moe": [7, 6]}


def test_experts_without_tokens_stay_where_they_are():
    """A zero gradient has no direction: no update, no nan. Decay alone moves them."""
    run = make_run([*MUON, "optim.weight_decay=0"], FORCED)
    before = {name: part.detach().clone() for name, part in hidden_parts(run).items()}
    for step in (1, 2):
        train_step(run, step)
    moved = {name for name, part in hidden_parts(run).items() if not torch.equal(part, before[name])}
    assert all(part.isfinite().all() for part in hidden_parts(run).values())
    assert {name.split("/")[1] for name in moved if name.startswith("layers.0.moe.experts")} == {"0", "1"}
    assert {name.split("/")[1] for name in moved if name.startswith("layers.1.moe.experts")} == {"6", "7"}


# --- meshes


@cache
def in_one_process(dtype: str, forced: bool) -> Trained:
    return alone([*MUON, f"run.dtype={dtype}"], 6, FORCED if forced else None)


def on_two_ranks(ranks, mode: str, dtype: str, forced: bool) -> Trained:
    overrides = [*MUON, f"parallel={mode}", "run.nproc=2", "train.micro_batch=4", f"run.dtype={dtype}"]
    return union(ranks(2).run(train_steps, overrides, 6, FORCED if forced else None))


@pytest.mark.ranks
@pytest.mark.parametrize("mode, forced",
                         [("ddp", False), ("ep", False), ("ep", True), ("fsdp", False), ("ep_fsdp", True)])
def test_two_ranks_give_what_one_process_gives(ranks, mode, forced):
    ours, truth = on_two_ranks(ranks, mode, "float64", forced), in_one_process("float64", forced)
    error, name = difference(ours.parameters, truth.parameters)
    assert error <= 1e-10, (name, error)
    for mine, theirs in zip(ours.metrics, truth.metrics):
        assert mine["loss/ce"] == pytest.approx(theirs["loss/ce"], abs=1e-10)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["ep", "fsdp"])
def test_gradients_that_are_rounding_alone_are_the_same_on_two_ranks(ranks, mode):
    overrides = [*ONE_TOKEN, "run.dtype=float64"]
    split = [*overrides, f"parallel={mode}", "run.nproc=2", "train.micro_batch=4"]
    ours, truth = union(ranks(2).run(train_steps, split, 5)), alone(overrides, 5)
    error, name = difference(ours.parameters, truth.parameters)
    assert error <= 1e-10, (name, error)


@pytest.mark.ranks
def test_matrices_that_are_cut_between_their_rows_are_gathered(ranks):
    """6 experts over 4 ranks are cut by rows, and so is the dense part."""
    overrides = [*MUON, "run.dtype=float64", "model.num_experts=6"]
    ours = union(
        ranks(4).run(train_steps, [*overrides, "parallel=fsdp", "run.nproc=4", "train.micro_batch=4"], 4))
    error, name = difference(ours.parameters, alone(overrides, 4).parameters)
    assert error <= 1e-10, (name, error)


@pytest.mark.ranks
def test_two_ranks_follow_one_process_in_float32(ranks):
    """As closely as under AdamW. Iterations in bfloat16 are 1e-4 and more apart by then."""
    for mine, theirs in zip(on_two_ranks(ranks, "ep", "float32", False).metrics,
                            in_one_process("float32", False).metrics):
        assert mine["loss/ce"] == pytest.approx(theirs["loss/ce"], abs=1e-5)


# --- resuming


@pytest.mark.parametrize("forgotten", [None, "momentum_buffer", "exp_avg"])
def test_a_restored_run_goes_on_to_the_bit_and_would_not_without_its_momentum(tmp_path: Path, forgotten):
    run, other = make_run(ALL_LAYERS), make_run(ALL_LAYERS)
    for step in (1, 2):
        train_step(run, step)
    train_step(other, 7)
    load(other.state, save(run.state, tmp_path, run.mesh, {}))
    for state in other.state.optimizer.state.values():
        if forgotten in state:
            state[forgotten].zero_()
    unbroken, resumed = ([train_step(each, step).metrics["loss/ce"] for step in (3, 4)]
                         for each in (run, other))
    same = all(torch.equal(*pair)
               for pair in zip(other.state.model.parameters(), run.state.model.parameters()))
    assert same == (resumed == unbroken) == (forgotten is None)
