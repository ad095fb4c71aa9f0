"""Projections: weight, bias and low-rank part, in a module and in training on every mesh."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.config.schema import Config
from moetrain.model.activation_checkpointing import recomputed
from moetrain.model.feed_forward import FeedForward
from moetrain.model.projection import Projection
from moetrain.model.transformer import Transformer
from tests.support.training import alone, difference, train_steps, union

STEPS = 3


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_projection_is_its_formula(bias: bool, rank: int) -> None:
    module = Projection(in_dim=3, out_dim=5, bias=bias)
    if rank:
        module.add_low_rank(rank, scale=0.5)
    filled(module)
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = x @ module.weight.T
    if bias:
        want = want + module.bias
    if rank:
        want = want + 0.5 * (x @ module.low_rank.a.T @ module.low_rank.b.T)
    torch.testing.assert_close(module(x), want)
    parameters = [name for name, _ in module.named_parameters()]
    assert parameters == ["weight", *["bias"] * bias, *["low_rank.a", "low_rank.b"] * bool(rank)]


def test_a_frozen_matrix_trains_the_low_rank_part_alone() -> None:
    module = Projection(in_dim=3, out_dim=5)
    module.add_low_rank(2)
    filled(module)
    module.weight.requires_grad_(False)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    assert module.weight.grad is None and module.low_rank.a.grad.any() and module.low_rank.b.grad.any()
    want, = torch.autograd.grad((x @ module.weight.T + x @ module.low_rank.a.T @ module.low_rank.b.T)
                                .square().sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_a_network_is_its_formula() -> None:
    module = filled(FeedForward(dim=3, hidden_dim=4))
    x = torch.randn(5, 3, dtype=torch.float64)
    gate, up = (x @ module.gate_up.weight.T).chunk(2, dim=-1)
    torch.testing.assert_close(module(x), (torch.nn.functional.silu(gate) * up) @ module.down.weight.T)


class Products(TorchDispatchMode):
    """Number of matrix products that ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_twice() -> None:
    """Those of bias and low-rank part are kept, too: backward runs its own products alone."""
    module = Projection(in_dim=3, out_dim=5, bias=True)
    module.add_low_rank(2)
    filled(module)
    counts = {}
    for mode in ("none", "selective", "full"):
        call = recomputed(mode) or (lambda function, *arguments: function(*arguments))
        x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        y = call(lambda x: module(x * 2).square(), x).sum()
        with Products() as products:
            y.backward()
        counts[mode] = products.count
    assert counts["selective"] == counts["none"] and counts["full"] == counts["none"] + 3


# --- a user that exists only here: attention with biases and adapters


def adapt(model: Transformer, config: Config) -> None:
    """Attention with an adapter in both projections and a bias in the first."""
    for block in model.layers:
        qkv = block.attention.qkv
        block.attention.qkv = Projection(in_dim=qkv.weight.shape[1], out_dim=qkv.weight.shape[0], bias=True)
        block.attention.qkv.add_low_rank(3, scale=2.0)
        block.attention.out.add_low_rank(2)


def adapt_frozen(model: Transformer, config: Config) -> None:
    """The same with everything else frozen."""
    model.requires_grad_(False)
    adapt(model, config)
    for block in model.layers:
        block.attention.qkv.weight.requires_grad_(False)


@pytest.fixture(scope="module")
def truth():
    return alone(["run.dtype=float64"], STEPS, None, adapt)


CASES = [("ddp", "none", 1), ("ep", "selective", 4), ("fsdp", "full", 4), ("ep_fsdp", "selective", 1),
         ("fssdp", "full", 1), ("single", "selective", 4)]
FACTORS = [("single", "ddp", "ep", "fsdp", "ep_fsdp", "fssdp"), ("none", "selective", "full"), (1, 4)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "checkpointing" in metafunc.fixturenames:
        metafunc.parametrize("mesh, checkpointing, accumulation",
                             product(*FACTORS) if metafunc.config.getoption("--all") else CASES)


@pytest.mark.ranks
def test_adapters_and_biases_train_alike_on_every_mesh(
        ranks, truth, mesh: str, checkpointing: str, accumulation: int) -> None:
    world = 1 if mesh == "single" else 2
    words = ["run.dtype=float64", f"parallel={mesh}", f"run.nproc={world}",
             f"train.micro_batch={16 // world // accumulation}",
             f"train.activation_checkpointing={checkpointing}"]
    ours = (alone(words, STEPS, None, adapt) if world == 1 else
            union(ranks(world).run(train_steps, words, STEPS, None, adapt)))
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(truth, what))
        assert error < 1e-10, (what, name, error)


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", ["fsdp", "ep"])
def test_adapters_of_a_frozen_base_train_alone_and_alike(ranks, mesh: str) -> None:
    words = ["run.dtype=float64", "train.activation_checkpointing=selective"]
    start, alone_ = (alone(words, steps, None, adapt_frozen) for steps in (0, STEPS))
    ours = union(ranks(2).run(train_steps, [*words, f"parallel={mesh}", "run.nproc=2", "train.micro_batch=8"],
                              STEPS, None, adapt_frozen))
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(alone_, what))
        assert error < 1e-10, (what, name, error)
    for name, tensor in ours.parameters.items():
        adapter = name.endswith((".bias", ".a", ".b"))
        assert torch.equal(tensor, start.parameters[name]) != adapter, name


def test_adapters_start_at_nothing_and_move(truth) -> None:
    """With B = 0 the first step is that of the base; then every new tensor moves."""
    base = alone(["run.dtype=float64"], 1)
    assert truth.metrics[0]["loss/ce"] == pytest.approx(base.metrics[0]["loss/ce"], abs=1e-13)
    start = alone(["run.dtype=float64"], 0, None, adapt).parameters
    for layer in (0, 1):
        for name in ("qkv.bias", "qkv.low_rank.a", "qkv.low_rank.b", "out.low_rank.a", "out.low_rank.b"):
            tensor = f"layers.{layer}.attention.{name}"
            assert bool(start[tensor].any()) == name.endswith(".a"), tensor
            assert _moved(start[tensor], truth.parameters[tensor]) > 1e-3, tensor


def _moved(before: Tensor, after: Tensor) -> float:
    return (after - before).abs().max().item()
