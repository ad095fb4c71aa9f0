"""Frozen parameters and scalars: the same on every mesh, and what is frozen stays to the bit.

n ranks equal one process to 1e-10 in float64: norm and first gradients, clipped; parameters after five steps.
A frozen parameter has no gradient, no moment and no part in the norm, and every bit of it stays. All others
move. Pairs of the factors mesh, what is frozen, optimizer, activation checkpointing and accumulation here,
the product with --all.

The users of frozen parameters and of scalars stand here: a layer of experts that its owner freezes, and a
router with a temperature.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moetrain.comm.mesh import lone_mesh
from moetrain.comm.reduce import sum_over_async
from moetrain.config.compose import compose
from moetrain.config.resumed import resume_conflicts
from moetrain.config.schema import Config
from moetrain.errors import CheckpointError
from moetrain.model.build import ConvertModel
from moetrain.model.transformer import Transformer
from moetrain.ops.start import Start, normal
from moetrain.parallel import data_parallel
from moetrain.routers.topk import TopKRouter
from moetrain.train.checkpoint.load import load
from moetrain.train.checkpoint.save import save
from moetrain.train.state import Run
from moetrain.train.step import train_step
from tests.support.random_copies import run_with_copies
from tests.support.training import (
    TINY,
    Held,
    Trained,
    difference,
    make_run,
    snapshot,
    train_run,
    union,
    whole,
)

STEPS = 5
COPIES = ["parallel=fssdp"]
MESHES = {
    "single": (1, []), "ddp": (2, ["parallel=ddp"]), "ep": (2, ["parallel=ep"]),
    "fsdp": (2, ["parallel=fsdp"]),
    "chunks": (2, ["parallel=ep", "schedule=fixed", "schedule.chunks=2"]),
    "hsdp": (4, ["parallel=fsdp", "parallel.shard=2"]), "ep_fsdp": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
    "fssdp": (2, [*COPIES, "parallel.rehome_interval=2"]),
    "fssdp, chunks": (2, [*COPIES, "schedule=fixed", "schedule.chunks=2", "parallel.rematerialize=true"]),
    "fssdp, sliced": (4, [*COPIES, "parallel.rehome_interval=2", "parallel.max_sliced_experts=3"]),
    "fssdp, two levels": (4, [*COPIES, "parallel.collective=two_level", "parallel.rematerialize=true"]),
}


# --- users of frozen parameters and scalars


def freeze_first_experts(model: Transformer, config: Config) -> None:
    """The owner of a layer freezes its experts."""
    model.layers[0].moe.experts.requires_grad_(False)


def freeze_all_but_routers(model: Transformer, config: Config) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" in name)


def freeze_base_in_bfloat16(model: Transformer, config: Config) -> None:
    """A base in bfloat16 beside trained parameters: in a block, in one bank, and the embedding."""
    experts = model.layers[1].moe.experts.bank
    for parameter in (model.embed, experts.gate_up, model.layers[0].attention.qkv.weight,
                      *model.layers[0].moe.experts.parameters()):
        parameter.data = parameter.data.bfloat16()
        parameter.requires_grad_(False)


class TemperedRouter(TopKRouter):
    """Router with a learned temperature, a scalar, and a learned shift of one element."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes)
        self.temperature, self.shift = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(1))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "temperature": normal(), "shift": normal()}

    def logits(self, x_TD: Tensor) -> Tensor:
        logits = super().logits(x_TD)
        ramp = torch.linspace(0, 1, logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return logits * (1.5 + self.temperature) + self.shift * ramp


def temper(model: Transformer, config: Config) -> None:
    for block in model.layers:
        block.moe.router = TemperedRouter(dim=config.model.dim, num_experts=config.model.num_experts,
                                          top_k=config.model.top_k)


def temper_and_freeze(model: Transformer, config: Config) -> None:
    temper(model, config)
    for block in model.layers:
        block.moe.router.temperature.requires_grad_(False)
        block.moe.router.weight.requires_grad_(False)


class Frozen(NamedTuple):
    """What is frozen: by `train.frozen` or by the owner; and which tensors that are, by their names."""

    patterns: str = ""
    convert: ConvertModel | None = None
    names: Callable[[str], bool] = lambda name: False


FROZEN = {
    "a layer and the embedding": Frozen("embed,layers.0.*",
                                        names=lambda name: name.startswith(("embed", "layers.0."))),
    "experts of a layer": Frozen(convert=freeze_first_experts,
                                 names=lambda name: "layers.0.moe.experts" in name),
    "one matrix": Frozen("*.experts.*.gate_up",
                         names=lambda name: ".experts." in name and name.endswith("gate_up")),
    "the other matrix": Frozen("layers.1.moe.experts.*.down",
                               names=lambda name: "layers.1.moe.experts" in name and name.endswith("down")),
    "base in bfloat16": Frozen(
        convert=freeze_base_in_bfloat16, names=lambda name: name in ("embed", "layers.0.attention.qkv.weight")
        or "layers.0.moe.experts" in name or "layers.1.moe.experts" in name and name.endswith("gate_up")),
    "routers": Frozen("*.router.*", names=lambda name: ".router." in name),
    "all but routers": Frozen(convert=freeze_all_but_routers, names=lambda name: ".router." not in name),
    "nothing, with scalars": Frozen(convert=temper),
    "a scalar": Frozen(convert=temper_and_freeze,
                       names=lambda name: name.endswith(("temperature", "router.weight"))),
}


class Case(NamedTuple):
    mesh: str
    frozen: str
    optimizer: str = "adamw"
    passes: str = "none"
    accumulation: int = 1


PAIRS = [
    Case("single", "all but routers", "muon", "full"),
    Case("ddp", "routers", "muon", "selective", 4),
    Case("ddp", "a scalar", "adamw"),
    Case("ep", "experts of a layer", "adamw", "full", 4),
    Case("chunks", "all but routers", "adamw", "selective"),
    Case("fsdp", "a layer and the embedding", "muon", "selective"),
    Case("fsdp", "base in bfloat16", "adamw", "selective", 2),
    Case("fssdp, sliced", "base in bfloat16", "adamw", "full"),
    Case("fsdp", "nothing, with scalars", "adamw", "none", 4),
    Case("hsdp", "all but routers", "muon", "full"),
    Case("ep_fsdp", "one matrix", "adamw", "none", 4),
    Case("fssdp", "experts of a layer", "muon", "none", 4),
    Case("fssdp", "one matrix", "adamw", "full"),
    Case("fssdp, chunks", "experts of a layer", "adamw", "none"),
    Case("fssdp, sliced", "the other matrix", "adamw", "selective", 2),
    Case("fssdp, two levels", "a scalar", "muon", "full", 2),
]
FACTORS = [list(MESHES), list(FROZEN), ["adamw", "muon"], ["none", "selective", "full"], [1, 2]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = [case for case in (Case(*values) for values in product(*FACTORS))
                 if "sliced" not in case.mesh or case.optimizer == "adamw"]   # Muon wants whole matrices
        cases = every if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def words(optimizer: str, frozen: Frozen) -> list[str]:
    return ["run.dtype=float64", "model.num_shared_experts=1", "optim.weight_decay=0.3", f"optim={optimizer}",
            *([f"train.frozen=[{frozen.patterns}]"] if frozen.patterns else [])]


class Outcome(NamedTuple):
    """What a rank trained, what it began with, and what it holds for the optimizer."""

    trained: Trained
    before: Held
    optimized: set[str]                      # names of tensors with moments
    odd: list[str]                           # frozen parameters of this rank with a gradient, group or moment


def train_case(overrides: list[str], convert: ConvertModel | None) -> Outcome:
    if COPIES[0] in overrides:
        run = run_with_copies(overrides, convert_model=convert)
        run.state.planning.restored()                    # copies from the first step on
    else:
        run = make_run(overrides, convert_model=convert)
    before = snapshot(run, lambda parameter: parameter.data)
    trained = train_run(run, STEPS)
    optimized = {shard.name.removeprefix("optim.").rpartition(".")[0] for shard in run.state.state_shards()
                 if shard.name.startswith("optim.")}
    grouped = {id(p) for group in run.state.optimizer.param_groups for p in group["params"]}
    odd = [name for name, p in run.state.model.named_parameters() if not p.requires_grad
           and (p.grad is not None or id(p) in grouped or run.state.optimizer.state.get(p))]
    return Outcome(trained, before, optimized, odd)


@cache
def truth(frozen: str, optimizer: str) -> Trained:
    return union([train_case(words(optimizer, FROZEN[frozen]), FROZEN[frozen].convert).trained])


@pytest.mark.ranks
def test_frozen_parameters_stay_and_the_others_train_alike_on_every_mesh(ranks, case: Case) -> None:
    (world, mesh), frozen = MESHES[case.mesh], FROZEN[case.frozen]
    overrides = [*words(case.optimizer, frozen), *mesh, f"train.activation_checkpointing={case.passes}",
                 f"run.nproc={world}", f"train.micro_batch={16 // world // case.accumulation}"]
    arguments = train_case, overrides, frozen.convert
    found = [train_case(*arguments[1:])] if world == 1 else ranks(world).run(*arguments)
    ours, before = union([outcome.trained for outcome in found]), whole([outcome.before for outcome in found])
    names = {name for name in before if frozen.names(name)}
    same = {name for name, tensor in ours.parameters.items() if torch.equal(tensor, before[name])}
    assert bool(names) == bool(frozen.patterns or frozen.convert is not temper)
    assert same == names
    assert set(ours.gradients) == set(before) - names
    assert [outcome.odd for outcome in found] == [[]] * world
    assert set().union(*(outcome.optimized for outcome in found)) == set(before) - names
    expected = truth(case.frozen, case.optimizer)
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics):
        for key in ("loss/ce", "loss/total", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key


# --- checkpoints


def go_on(run: Run) -> Held:
    """Parameters after the next two steps."""
    for step in range(run.state.step + 1, run.state.step + 3):
        train_step(run, step)
    return snapshot(run, lambda parameter: parameter.data)


def train_and_save(directory: str) -> Held:
    mesh = ["run.nproc=2", "parallel=fsdp", "train.micro_batch=8"]
    run = make_run([*words("adamw", FROZEN["a scalar"]), *mesh], convert_model=temper_and_freeze)
    go_on(run)
    save(run.state, Path(directory), run.mesh, {})
    return go_on(run)


@pytest.mark.ranks
def test_a_checkpoint_with_scalars_and_frozen_parameters_loads_on_another_mesh(ranks, tmp_path: Path) -> None:
    expected = whole(ranks(2).run(train_and_save, str(tmp_path)))
    run = make_run(words("adamw", FROZEN["a scalar"]), convert_model=temper_and_freeze)
    load(run.state, next(tmp_path.glob("checkpoints/step-*")))
    ours = whole([go_on(run)])
    error, name = difference(ours, expected)
    assert error <= 1e-10, (name, error)
    assert ours["layers.0.moe.router.temperature"].shape == ()


def test_a_run_goes_on_with_the_same_frozen_parameters_only(tmp_path: Path) -> None:
    began, other = (compose([*TINY, f"train.frozen=[{pattern}]"]) for pattern in ("embed", "head"))
    (error,) = resume_conflicts(began, other)
    assert error.what == "train.frozen was [embed] and is [head] now"
    save(make_run(["train.frozen=[embed]"]).state, tmp_path, lone_mesh(torch.device("cpu")), {})
    with pytest.raises(CheckpointError, match="optim.embed.exp_avg is not in the checkpoint"):
        load(make_run([]).state, next(tmp_path.glob("checkpoints/step-*")))


# --- what travels


def reduced(overrides: list[str]) -> tuple[int, int]:
    """Numbers that the sums of gradients of a step take, and those of the trainable parameters."""
    run, sent = make_run(overrides), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "sum_over_async",
                      lambda group, flat: (sent.append(flat.numel()), sum_over_async(group, flat))[1])
        train_step(run, 1)
    return sum(sent), sum(p.numel() for p in run.state.model.parameters() if p.requires_grad)


@pytest.mark.ranks
def test_only_gradients_of_trainable_parameters_travel(ranks) -> None:
    (sent, trainable), other = ranks(2).run(
        reduced, ["parallel=ddp", "run.nproc=2", "train.micro_batch=8", "train.frozen=[embed,*.experts.*]"])
    assert sent == trainable > 0 and other == (sent, trainable)
    assert trainable < make_run([]).state.model.embed.numel() * 8
