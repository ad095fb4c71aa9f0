"""Parallel equals serial: every mesh gives what an oracle in one process gives.

Factors: mesh, accumulation, shared experts, unequal padding, a forced router that leaves experts and whole
ranks without tokens, and how the forward passes are run (activation checkpointing, count pass). Pairs of
factors here, the full product with --all.

float64 to 1e-10 against tests/support/oracle.py: first gradients, clipped; norm; counts exactly; parameters
after 8 steps of AdamW (20 with --all). float32, every third case, through the path that ships: first
gradients at 1e-5 with the choices fixed, loss curves within 1e-3.
"""

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from moetrain.train.optim.lr_schedule import learning_rate
from tests.support.oracle import oracle_loss
from tests.support.training import (
    FORCED,
    Trained,
    alone,
    difference,
    make_run,
    snapshot,
    train_steps,
    union,
    whole,
)

STEPS, MANY_STEPS = 8, 20
MESHES = {
    "single": (1, []), "ddp1": (1, ["parallel=ddp"]), "ep1": (1, ["parallel=ep"]),
    "ddp2": (2, ["parallel=ddp"]), "ep2": (2, ["parallel=ep"]),
    "ep1of2": (2, ["parallel=ep", "parallel.ep=1"]),
    "ddp4": (4, ["parallel=ddp"]), "ep4": (4, ["parallel=ep"]),
    "ep2of4": (4, ["parallel=ep", "parallel.ep=2"]),
    "ep1of4": (4, ["parallel=ep", "parallel.ep=1"]),
    "fsdp1": (1, ["parallel=fsdp"]), "fsdp2": (2, ["parallel=fsdp"]), "fsdp4": (4, ["parallel=fsdp"]),
    "hsdp4": (4, ["parallel=fsdp", "parallel.shard=2"]),                        # replicated twice
    # Experts whole, the rest sharded
    "ep_fsdp2": (2, ["parallel=ep_fsdp"]),
    "ep2_fsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),                    # experts over ep and sharded
    "ep2_hsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2", "parallel.shard=2"]),
    "ep1_hsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=1", "parallel.shard=2"]),
}
PASSES = {
    "keep": [], "selective": ["train.activation_checkpointing=selective"],
    "full": ["train.activation_checkpointing=full"],
    "count": ["train.count_pass=true"],
    "count-full": ["train.count_pass=true", "train.activation_checkpointing=full"],
}
FACTORS = {"mesh": list(MESHES), "accumulation": [1, 4], "shared": [0, 1], "padded": [False, True],
           "forced": [False, True],
           "passes": list(PASSES)}
# Every pair of values of two of the first five factors occurs; `passes` goes round.
PAIRS = [
    ("single", 1, 0, False, False, "keep"),
    ("single", 4, 1, True, True, "count"),
    ("ddp1", 4, 0, True, False, "keep"),
    ("ep1", 1, 1, False, True, "selective"),
    ("ddp2", 1, 1, True, False, "full"),
    ("ddp2", 4, 0, False, True, "count-full"),
    ("ep2", 1, 0, True, True, "keep"),
    ("ep2", 4, 1, False, False, "full"),
    ("ep1of2", 4, 1, True, False, "selective"),
    ("ep1of2", 1, 0, False, True, "selective"),
    ("ddp4", 1, 0, True, True, "full"),
    ("ddp4", 4, 1, False, False, "count"),
    ("ep4", 1, 1, False, True, "keep"),
    ("ep4", 4, 0, True, False, "count"),
    ("ep2of4", 1, 0, False, False, "selective"),
    ("ep2of4", 4, 1, True, True, "keep"),
    ("ep1of4", 4, 0, False, False, "count-full"),
    ("ep1of4", 1, 1, True, True, "full"),
    ("fsdp1", 4, 1, True, False, "full"),
    ("fsdp2", 1, 0, True, True, "keep"),
    ("fsdp2", 4, 1, False, False, "selective"),
    ("fsdp4", 4, 0, True, True, "count"),
    ("hsdp4", 1, 1, False, True, "selective"),
    ("hsdp4", 4, 0, True, False, "count"),
    ("ep_fsdp2", 4, 1, True, False, "keep"),
    ("ep_fsdp2", 1, 0, False, True, "full"),
    ("ep2_fsdp4", 1, 0, True, False, "keep"),
    ("ep2_fsdp4", 4, 1, False, True, "count-full"),
    ("ep2_hsdp4", 4, 1, True, True, "full"),
    ("ep2_hsdp4", 1, 0, False, False, "selective"),
    ("ep1_hsdp4", 4, 0, True, True, "selective"),
]


# The same with the experts' exchange in chunks, and with a row for every slot: (case, overrides).
CHUNKED = [
    (("ep2", 1, 0, True, True, "keep"), ["schedule.chunks=2"]),
    (("ep4", 2, 1, True, False, "count"), ["schedule.chunks=4", "parallel.exact_combine=true"]),
    (("ep4", 1, 1, True, False, "full"), ["schedule.chunks=3", "parallel.exchange=peer"]),
    (("ep2of4", 2, 0, False, True, "selective"), ["schedule.chunks=2", "parallel.exchange=peer_push"]),
    (("ep_fsdp2", 2, 1, True, False, "full"), ["schedule.chunks=2"]),
    (("ep2_fsdp4", 1, 1, False, False, "full"), ["schedule.chunks=3", "train.head_chunk=20"]),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        few = PAIRS[::3] if "float32" in metafunc.function.__name__ else PAIRS
        cases = list(product(*FACTORS.values())) if metafunc.config.getoption("--all") else few
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> int:
    return MANY_STEPS if request.config.getoption("--all") else STEPS


def variant(shared: int, padded: bool) -> list[str]:
    return [f"model.num_shared_experts={shared}", f"data.min_length={0.2 if padded else 1.0}"]


def on_mesh(ranks, case: tuple, dtype: str, steps: int, extra: tuple[str, ...] = ()) -> Trained:
    mesh, accumulation, shared, padded, forced, passes = case
    world, overrides = MESHES[mesh]
    overrides = [*overrides, *variant(shared, padded), *PASSES[passes], *extra, f"run.dtype={dtype}",
                 f"run.nproc={world}",
                 f"train.micro_batch={16 // world // accumulation}"]
    arguments = (train_steps, overrides, steps, FORCED if forced else None)
    return alone(*arguments[1:]) if world == 1 else union(ranks(world).run(*arguments))


@cache
def truth(shared: int, padded: bool, forced: bool, steps: int) -> Trained:
    """Steps of the oracle with torch's AdamW, on the parameters that our initialisation gives."""
    run = make_run([*variant(shared, padded), "run.dtype=float64"])
    sizes, optim = run.config.model, run.config.optim
    initial = whole([snapshot(run, lambda p: p.data)])
    ours = {name.removesuffix(".weight"): name for name in initial}
    params = {name.removesuffix(".weight"): tensor.requires_grad_() for name, tensor in initial.items()}
    decayed = [p for name, p in params.items()
               if p.ndim > 1 and name not in ("embed", "head") and ".router" not in name]
    undecayed = [p for p in params.values() if not any(p is d for d in decayed)]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": optim.weight_decay},
                               {"params": undecayed, "weight_decay": 0.0}], betas=tuple(optim.betas),
                              eps=optim.eps)
    gradients, metrics, counts = {}, [], []
    for step in range(1, steps + 1):
        batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(step)]
        total, ce, balance, found = oracle_loss(
            params, batches, balance_weight=0.1, balance_scope="global", z_weight=0.01, num_layers=2,
            num_heads=4, num_kv_heads=2, head_dim=4, top_k=2, num_experts=8, num_shared_experts=shared,
            norm_eps=sizes.norm_eps,
            forced={0: torch.tensor([0, 1]), 1: torch.tensor([7, 6])} if forced else None,
        )
        adamw.zero_grad()
        total.backward()
        for p in params.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(params.values(), run.config.train.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, run.config.run.steps, optim)
        gradients = gradients or {ours[name]: p.grad.clone() for name, p in params.items()}
        adamw.step()
        metrics.append({"loss/ce": ce.item(), "loss/total": total.item(), "loss/balance": balance.item(),
                        "grad_norm": norm.item()})
        counts.append({f"layers.{layer}.moe": count for layer, count in enumerate(found)})
    return Trained({ours[name]: p.detach().clone() for name, p in params.items()}, gradients, metrics, counts)


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> None:
    error, name = difference(ours, expected)
    assert error <= tolerance, f"{what}: {name} differs by {error:.3g} of its largest value"


@pytest.mark.ranks
def test_a_mesh_gives_what_the_oracle_gives_in_float64(ranks, case, steps):
    check(on_mesh(ranks, case, "float64", steps), truth(*case[2:5], steps))


@pytest.mark.ranks
@pytest.mark.parametrize("chunked", CHUNKED,
                         ids=lambda chunked: "-".join(map(str, [*chunked[0], *chunked[1]])))
def test_chunks_change_nothing(ranks, chunked, steps):
    case, overrides = chunked
    check(on_mesh(ranks, case, "float64", steps, ("schedule=fixed", *overrides)), truth(*case[2:5], steps))


def check(ours: Trained, expected: Trained) -> None:
    assert_close(ours.gradients, expected.gradients, 1e-10, "gradient of the first step")
    assert_close(ours.parameters, expected.parameters, 1e-10,
                 f"parameter after {len(expected.metrics)} steps")
    for step, (mine, theirs) in enumerate(zip(ours.metrics, expected.metrics), 1):
        for key, value in theirs.items():
            assert abs(mine[key] - value) <= 1e-10 * max(1.0, abs(value)), (step, key, mine[key], value)
        for name, count in expected.counts[step - 1].items():
            assert torch.equal(ours.counts[step - 1][name], count), (step, name)


@pytest.mark.parametrize("overrides, oracle", [
    (["model.qk_norm=head", "model.tie_embeddings=true"], {"qk_norm": True, "tie_embeddings": True}),
    (["model.num_layers=3", "model.first_dense_layers=1", "model.num_experts=[8,4,6]", "model.top_k=[2,1,3]",
      "router.weights=raw"],
     {"num_layers": 3, "first_dense_layers": 1, "num_experts": [8, 4, 6], "top_k": [2, 1, 3], "gate": "raw"}),
    (["model.num_layers=4", "model.moe_layers=every_2", "model.dense_dim=20"],
     {"num_layers": 4, "moe_layers": [1, 3]}),
    (["model.num_layers=4", "model.num_experts=[4,0,8,0]"],
     {"num_layers": 4, "moe_layers": [0, 2], "num_experts": [4, 0, 8, 0]}),
    (["balance=micro", "balance.weight=0.1", "train.micro_batch=4"], {"balance_scope": "micro"}),
    (["balance=none", "~balance.weight"], {"balance_scope": "none"}),
    (["train.head_chunk=50"], {}),
    (["train.head_chunk=7", "model.tie_embeddings=true", "train.aux_loss=injected"],
     {"tie_embeddings": True}),
], ids=["qk_norm-tied", "ragged-dense-raw", "every second", "entries of 0", "micro", "none",
        "head in chunks", "tied head in chunks"])
def test_variants_of_the_model_give_what_the_oracle_gives(overrides, oracle):
    overrides = ["run.dtype=float64", "data.min_length=0.2", "train.clip=0", *overrides]
    run = make_run(overrides)
    params = {name.removesuffix(".weight"): tensor.requires_grad_()
              for name, tensor in whole([snapshot(run, lambda p: p.data)]).items()}
    batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(1)]
    model = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "top_k": 2, "num_experts": 8,
             **oracle}
    total, ce, balance, _ = oracle_loss(params, batches, balance_weight=0.1, z_weight=0.01, **model)
    total.backward()
    ours = alone(overrides, 1)
    assert_close({name.removesuffix(".weight"): gradient for name, gradient in ours.gradients.items()},
                 {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()},
                 1e-10, "gradient")
    for key, value in (("loss/total", total), ("loss/ce", ce), ("loss/balance", balance)):
        assert abs(ours.metrics[0][key] - value.item()) <= 1e-10, key


@cache
def serial_float32(shared: int, padded: bool, forced: bool) -> Trained:
    return alone([*variant(shared, padded), "run.dtype=float32"], 6, FORCED if forced else None)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_mesh_gives_what_one_process_gives_in_float32(ranks, case):
    ours, expected = on_mesh(ranks, case, "float32", 6), serial_float32(*case[2:5])
    if case[4] or all(torch.equal(ours.counts[0][name], count) for name, count in expected.counts[0].items()):
        assert_close(ours.gradients, expected.gradients, 1e-5, "gradient of the first step")
    else:
        pytest.fail("the first step's choices differ")
    for mine, theirs in zip(ours.metrics, expected.metrics):
        assert abs(mine["loss/ce"] - theirs["loss/ce"]) <= 1e-3


@pytest.mark.ranks
def test_four_accumulated_micro_batches_of_one_are_one_of_four(ranks):
    """exact: accumulation 4 x micro-batch 1 equals 1 x 4 on four ranks, routers and hidden states alike."""
    split, whole = (on_mesh(ranks, ("ep2of4", a, 1, True, False, "keep"), "float64", 3) for a in (4, 1))
    assert_close(split.parameters, whole.parameters, 1e-10, "parameter after 3 steps")
    assert_close(split.gradients, whole.gradients, 1e-10, "gradient")
