"""Other forms of experts than SwiGLU train alike on every mesh, and so do layers of different widths.

n ranks equal one process to 1e-10 in float64: norm and first gradients, clipped; parameters after five steps.
The one process computes expert after expert with plain products (`by_hand`). Pairs of the factors mesh,
form, optimizer, activation checkpointing and accumulation here, the product with --all.

The users of the interface are forms of tests/support/expert_forms.py, chosen by `expert._target_`.
"""

from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moetrain.config.compose import compose
from moetrain.errors import ConfigErrors
from moetrain.moe.expert_form import ExpertForm
from moetrain.ops.permute import permute
from tests.support.expert_forms import TwoMatrixExpert, reference, use_apart
from tests.support.random_copies import run_with_copies
from tests.support.training import TINY, Trained, difference, make_run, train_run, union

STEPS = 5
COPIES = ["parallel=fssdp"]
CHUNKS = ["schedule=fixed", "schedule.chunks=2"]
MESHES = {
    "single": (1, []), "ddp": (2, ["parallel=ddp"]), "ep": (2, ["parallel=ep"]),
    "chunks": (2, ["parallel=ep", *CHUNKS]), "fsdp": (2, ["parallel=fsdp"]),
    "fsdp by rows": (4, ["parallel=fsdp", "model.num_experts=[6,8]"]),
    "ep_fsdp": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
    "fssdp": (2, [*COPIES, "parallel.rehome_interval=2"]),
    "fssdp, chunks, gathered again": (2, [*COPIES, *CHUNKS, "parallel.rematerialize=true"]),
    "fssdp, two levels, gathered again": (4, [*COPIES, "parallel.collective=two_level",
                                              "parallel.rematerialize=true"]),
    "fssdp, sliced": (4, [*COPIES, "parallel.rehome_interval=2", "parallel.max_sliced_experts=3"]),
}
OWN = ["run.packages=[tests]"]
FORMS = {
    "biased": [*OWN, "expert._target_=tests.support.expert_forms.BiasedExpert"],
    "gpt_oss": ["expert=gpt_oss", "expert.limit=0.1", "router.logit_bias=true"],
    "gpt_oss, partly frozen": ["expert=gpt_oss", "expert.limit=0.1",
                               "train.frozen=[*.experts.*.gate_up,*.experts.*.down_bias]"],
    "ternary": [*OWN, "expert._target_=tests.support.expert_forms.TernaryExpert"],
    "widths": ["model.expert_dim=[16,24]", "model.num_shared_experts=1", "model.shared_dim=20"],
    "biased, frozen": [*OWN, "expert._target_=tests.support.expert_forms.BiasedExpert",
                       "train.frozen=[*.experts.*]"],
    "biased, partly frozen": [*OWN, "expert._target_=tests.support.expert_forms.BiasedExpert",
                              "train.frozen=[*.experts.*.up,*.experts.*.down_bias]"],
    "biased, widths": [*OWN, "expert._target_=tests.support.expert_forms.BiasedExpert",
                       "model.expert_dim=[24,10]"],
}


class Case(NamedTuple):
    mesh: str
    form: str = "biased"
    optimizer: str = "adamw"
    passes: str = "none"
    accumulation: int = 1


PAIRS = [
    Case("ddp", "gpt_oss", "muon", "selective"),
    Case("chunks", "widths", "adamw", "selective", 2),
    Case("fsdp by rows", "biased", "adamw", "full", 2),
    Case("ep_fsdp", "ternary", "adamw", "selective", 1),
    Case("fssdp", "biased, widths", "muon", "none", 2),
    Case("fssdp, chunks, gathered again", "biased, frozen", "adamw", "none", 2),
    Case("fssdp, two levels, gathered again", "ternary", "adamw", "full"),
    Case("fssdp, sliced", "gpt_oss, partly frozen", "adamw", "selective", 2),
    Case("chunks", "gpt_oss", "adamw", "full"),
]
FACTORS = [list(MESHES), list(FORMS), ["adamw", "muon"], ["none", "selective", "full"], [1, 2]]


def possible(case: Case) -> bool:
    """Slices: neither Muon nor quantized matrices."""
    return "sliced" not in case.mesh or case.optimizer == "adamw" and case.form != "ternary"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = [case for case in (Case(*values) for values in product(*FACTORS)) if possible(case)]
        cases = every if metafunc.config.getoption("--all") else PAIRS
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def words(form: str, optimizer: str) -> list[str]:
    return ["run.dtype=float64", f"optim={optimizer}", *FORMS[form]]


def train_case(overrides: list[str]) -> Trained:
    if COPIES[0] not in overrides:
        return train_run(make_run(overrides), STEPS)
    run = run_with_copies(overrides)
    run.state.planning.restored()                        # copies from the first step on
    return train_run(run, STEPS)


@cache
def truth(form: str, optimizer: str, sizes: tuple[str, ...]) -> Trained:
    """Training in this process, every expert computed by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.moe.expert_form.SwigluExpert.compute", by_hand)
        patch.setattr(ExpertForm, "compute", by_hand)
        return union([train_case([*words(form, optimizer), *sizes])])


def by_hand(form, x_ND, weights_R, counts_e, order, homes, copies=None, part="rows") -> Tensor:
    """Outputs of rows in the order of experts, by plain products, expert after expert."""
    x_RD = x_ND if order is None else permute(x_ND, order)
    if form.QUANTIZED:                       # the bank has quantized them
        form = TwoMatrixExpert(dim=form.dim, expert_dim=form.expert_dim)
    own = (dict(zip(form.shapes, parameters)) for parameters in zip(*homes))
    return torch.cat([reference(form, *rows, parameters) for *rows, parameters in
                      zip(x_RD.split(counts_e), weights_R.split(counts_e), own, strict=True)])


@pytest.mark.ranks
def test_a_form_trains_alike_on_every_mesh(ranks, case: Case) -> None:
    world, mesh = MESHES[case.mesh]
    overrides = [*words(case.form, case.optimizer), *mesh, f"train.activation_checkpointing={case.passes}",
                 f"run.nproc={world}", f"train.micro_batch={16 // world // case.accumulation}"]
    ours = union([train_case(overrides)] if world == 1 else ranks(world).run(train_case, overrides))
    expected = truth(case.form, case.optimizer, tuple(word for word in mesh if word.startswith("model.")))
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    of_experts = [gradient for name, gradient in ours.gradients.items() if ".experts." in name]
    assert bool(of_experts) == (case.form != "biased, frozen") and all(each.any() for each in of_experts)
    for mine, theirs in zip(ours.metrics, expected.metrics):
        for key in ("loss/ce", "loss/total", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key


APART = [*OWN, "run.dtype=float64", "expert._target_=tests.support.expert_forms.QueryOutputExpert"]


def train_apart(overrides: list[str]) -> Trained:
    if COPIES[0] not in overrides:
        return train_run(make_run(overrides, convert_model=use_apart), STEPS)
    run = run_with_copies(overrides, convert_model=use_apart)
    run.state.planning.restored()
    return train_run(run, STEPS)


@pytest.mark.ranks
@pytest.mark.parametrize("mesh, passes, frozen", [
    ("ep", "selective", ""), ("fssdp", "none", ""), ("fssdp", "none", "*.experts.*.out"),
    *(pytest.param(mesh, passes, "", marks=pytest.mark.full)
      for mesh, passes in [("single", "full"), ("ep_fsdp", "none"), ("chunks", "full"), ("fssdp", "full"),
                           ("fssdp, two levels, gathered again", "none")])])
def test_matrices_that_are_used_apart_train_like_those_of_one_expert(ranks, mesh, passes, frozen) -> None:
    """The layer sends every token twice; the truth is the same form in a MoE layer, in one pass."""
    world, words = MESHES[mesh]
    plain = [*APART, *([f"train.frozen=[{frozen}]"] if frozen else [])]
    overrides = [*plain, *words, f"train.activation_checkpointing={passes}", f"run.nproc={world}",
                 f"train.micro_batch={16 // world}"]
    ours = union([train_apart(overrides)] if world == 1 else ranks(world).run(train_apart, overrides))
    expected = union([train_case(plain)])
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"


def test_the_tensors_of_a_form_have_its_names_and_shapes() -> None:
    trained = truth("biased, widths", "muon", ()).parameters
    shapes = {name: tuple(tensor.shape) for name, tensor in trained.items() if "experts.3" in name}
    assert shapes == {
        f"layers.{layer}.moe.experts.3.{name}": shape for layer, width in enumerate((24, 10))
        for name, shape in (("up", (width, 16)), ("up_bias", (width,)), ("down", (16, width)),
                            ("down_bias", (16,)))}


@pytest.mark.parametrize("words, number, key", [
    ([*FORMS["ternary"], "parallel=fssdp", "parallel.max_sliced_experts=2"], 215, "max_sliced_experts"),
    (["model.shared_dim=8"], 100, "model.shared_dim"),
    (["model.expert_dim=[16,16,16]"], 27, "model.expert_dim"),
    (["expert._target_=moetrain.moe.capacity.CapacityPolicy"], 8, "expert"),
])
def test_what_does_not_fit_is_refused_before_ranks_join(words, number, key) -> None:
    with pytest.raises(ConfigErrors) as found:
        compose([*TINY, "run.nproc=2", *words])
    assert f"E-CONFIG-{number:03}" in str(found.value) and key in str(found.value)
