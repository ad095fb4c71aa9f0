"""The balance loss by scope and mode: every mesh gives what the oracle gives.

The oracle is told, for every micro-batch, the micro-batches whose counts are its f. float64 to 1e-10:
gradients of every step, clipped; counts exactly; the reported value is always that of the whole step.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.train.checkpoint.load import load
from moetrain.train.checkpoint.save import save
from moetrain.train.count_pool import PreviousStepCounts
from moetrain.train.metrics import SumBuffer
from moetrain.train.micro_batches import forwards
from moetrain.train.step import train_step
from tests.support.balance_oracle import BASE, STEPS, WORLDS, steps, truth
from tests.support.training import difference, make_run, snapshot, whole

# mode or scope: what of it is chosen, and for one of the batches (one sequence each, 4 a turn) those that
# give its f
POOLS: dict[str, tuple[list[str], Callable[[int], list[int]]]] = {
    "exact": ([], lambda b: list(range(16))),
    "count pass": (["train.count_pass=true"], lambda b: list(range(16))),
    "sync": (["balance.mode=sync"], lambda b: list(range(b // 4 * 4, b // 4 * 4 + 4))),
    "buffer": (["balance.mode=buffer"], lambda b: list(range(b // 4 * 4 + 4))),
    "warm": (["balance.mode=warm", "balance.drift=1"], lambda b: list(range(b // 4 * 4 + 4))),
    "sequence": (["balance=sequence", "balance.weight=0.3"], lambda b: [b]),
    "node": (["balance=node", "balance.weight=0.3"],
             lambda b: [other for other in range(16) if other % 4 // 2 == b % 4 // 2]),
    "node, buffer": (["balance=node", "balance.weight=0.3", "balance.mode=buffer"],
                     lambda b: [other for other in range(b // 4 * 4 + 4) if other % 4 // 2 == b % 4 // 2]),
}


@pytest.mark.ranks
@pytest.mark.parametrize("pool, world", [(pool, world) for pool in POOLS for world in WORLDS
                                         # On one machine a node's pool is the global one
                                         if world == 4 or not pool.startswith("node")])
def test_every_scope_and_mode_gives_what_the_oracle_gives(ranks, pool, world):
    overrides, pools = POOLS[pool]
    overrides = [*BASE, *WORLDS[world], *overrides, f"train.micro_batch={4 // world}"]
    results = ([steps(overrides, 1)] if world == 1
               else ranks(world).run(steps, overrides, 2 if pool.startswith("node") else world))
    prior = None
    for step in range(1, STEPS + 1):
        of_step = [rank[step - 1] for rank in results]
        grads, counts, balance = truth(whole([rank[3] for rank in of_step]), step, pools, prior)
        error, name = difference(whole([rank[0] for rank in of_step]), grads)
        assert error <= 1e-10, f"step {step}: {name} differs by {error:.3g} of its largest value"
        for _, ours, reported, _ in of_step:
            assert [count.tolist() for count in ours.values()] == [count.tolist() for count in counts]
            assert reported == pytest.approx(balance, rel=1e-12)
        prior = counts if pool == "warm" else None


CARRIED = {                                              # name: processes, overrides
    "exact": (2, []),
    "count pass, recomputed": (2, ["train.count_pass=true", "train.activation_checkpointing=full"]),
    "buffer": (2, ["balance.mode=buffer"]), "micro, sharded": (2, ["balance=micro", "parallel=fsdp"]),
    "sequence": (1, ["balance=sequence"]),
    "other sizes": (1, ["model.num_layers=3", "model.num_experts=[8,8,4]"]),
    "micro beside it": (1, ["loss=[z,micro_balance]", "loss.micro_balance.weight=0.2"]),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CARRIED)
def test_added_and_injected_losses_give_equal_gradients(ranks, case):
    world, overrides = CARRIED[case]
    overrides = [*BASE, *WORLDS[world], *overrides, f"train.micro_batch={4 // world}"]
    arguments = [([*overrides, f"train.aux_loss={way}"], world) for way in ("added", "injected")]
    added, injected = ([steps(*a)] if world == 1 else ranks(world).run(steps, *a) for a in arguments)
    for step in range(STEPS):
        ours, theirs = (whole([rank[step][0] for rank in results]) for results in (injected, added))
        error, name = difference(ours, theirs)
        assert error <= 1e-12, f"step {step + 1}: {name} differs by {error:.3g} of its largest value"
        assert theirs["layers.0.moe.router.weight"].abs().max() > 1e-3


def collectives(overrides: list[str]) -> list[int]:
    """All-reduces of counts in the forward passes of a step, and how many were posted when the head ran."""
    import torch.distributed as dist

    run, posted = make_run(overrides), []
    original = dist.all_reduce

    def counted(tensor, *arguments, **named):
        if tensor.dtype == torch.int64 and tensor.numel() == 16:
            posted.append(tensor)
        return original(tensor, *arguments, **named)

    dist.all_reduce, run.state.model.norm.forward, norm = (
        counted, lambda x: heads.append(len(posted)) or norm(x), run.state.model.norm.forward)
    heads: list[int] = []
    try:
        batches = run.loader.step(1)
        for forward in forwards(run, 1, batches, torch.tensor(100)):
            run.objective.backward(forward.language, forward.stacks, forward.pooled, torch.tensor(100))
    finally:
        dist.all_reduce = original
    return [len(posted), *heads]


@pytest.mark.ranks
@pytest.mark.parametrize("mode, expected", [("exact", [1, 0, 0, 0, 1]), ("buffer", [4, 1, 2, 3, 4]),
                                            ("warm", [4, 1, 2, 3, 4])])
def test_one_collective_at_most_a_micro_batch_and_it_is_on_its_way_when_the_head_runs(ranks, mode, expected):
    overrides = [*BASE, *WORLDS[2], f"balance.mode={mode}", "train.micro_batch=2"]
    assert ranks(2).run(collectives, overrides) == [expected, expected]


def resumed(overrides: list[str], directory: Path) -> tuple[list, list]:
    run, again = make_run(overrides), make_run(overrides)
    first = [train_step(run, step).metrics["loss/total"] for step in (1, 2)]
    path = save(run.state, directory, run.mesh, {})
    first = [train_step(run, step).metrics["loss/total"].hex() for step in (3, 4)]
    load(again.state, path, mesh=again.mesh)
    return first, [train_step(again, step).metrics["loss/total"].hex() for step in (3, 4)]


@pytest.mark.parametrize("forget", [False, True])
def test_the_step_before_is_part_of_the_state(tmp_path, monkeypatch, forget):
    if forget:
        monkeypatch.setattr(PreviousStepCounts, "state_shards", lambda self: iter(()))
    first, again = resumed([*BASE, "balance.mode=warm", "balance.drift=1", "train.micro_batch=4"], tmp_path)
    assert (first == again) == (not forget)


def test_shares_that_have_moved_far_stand_for_nothing():
    prior = PreviousStepCounts({"a": 2, "b": 2}, 0.3, torch.device("cpu"))
    known_L, tokens = torch.tensor([3, 1, 3, 1]), torch.tensor(8)
    # Nothing known of a step before
    assert prior.complete(known_L, tokens).tolist() == [3, 1, 3, 1]
    prior.observe(torch.tensor([4, 4, 4, 4]), torch.tensor(8))
    assert prior.complete(known_L, tokens).tolist() == [5, 3, 5, 3]
    # B has moved by a half
    prior.observe(torch.tensor([5, 3, 8, 0]), torch.tensor(8))
    assert prior.complete(known_L, tokens).tolist() == [5.5, 2.5, 3, 1]


def test_without_accumulation_all_modes_are_one():
    losses = [steps([*BASE, f"balance.mode={mode}", "train.micro_batch=16"], 1)
              for mode in ("exact", "sync", "buffer", "warm")]
    for other in losses[1:]:
        assert difference(whole([other[-1][3]]), whole([losses[0][-1][3]]))[0] == 0


# --- selection biases by the counts of micro-batches


MICRO_BIAS = ["run.dtype=float64", "router=sigmoid", "router.counts=micro", "router.update_rate=0.05",
              "balance=none", "~balance.weight", "train.micro_batch=2",
              "data.min_length=0.2"]


def biases(overrides: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Biases by router and parameters after some steps, and the counts of every micro-batch of this rank."""
    run, counts, add = make_run(overrides), [], SumBuffer.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SumBuffer, "add", lambda self, ce, total, stacks: (
            counts.append({name: counts_E.clone() for stack in stacks
                           for name, counts_E in zip(stack.routers, stack.stats.counts_E)}),
            add(self, ce, total, stacks)))
        for step in range(1, STEPS + 1):
            train_step(run, step)
    held = {block.moe.name: block.moe.router.bias.clone() for block in run.state.model.layers}
    return held, snapshot(run, lambda p: p.data), counts


@pytest.mark.ranks
def test_biases_move_by_every_micro_batch_alike_wherever_it_is(ranks):
    alone, parameters, counts = biases(MICRO_BIAS)
    for name, bias_E in alone.items():
        expected_E = torch.zeros_like(bias_E)
        for step in range(STEPS):
            for of in counts[8 * step:8 * step + 8]:
                mean = of[name].double().mean()
                expected_E += 0.05 / 8 * torch.tensor(
                    [(n < mean) * 1.0 - (n > mean) * 1.0 for n in of[name].tolist()]).double()
        assert bias_E.tolist() == pytest.approx((expected_E - expected_E.mean()).tolist(), abs=1e-12)
    for world in (2, 4):
        results = ranks(world).run(biases, [*MICRO_BIAS, *WORLDS[world]])
        for held, _, _ in results:
            assert all(torch.equal(held[name], alone[name]) for name in alone)
        theirs = whole([pieces for _, pieces, _ in results])
        assert all(torch.allclose(theirs[name], whole([parameters])[name], rtol=0, atol=1e-10)
                   for name in theirs)
    by_step, _, _ = biases([*MICRO_BIAS, "router.counts=global"])
    assert any(not torch.equal(by_step[name], alone[name]) for name in alone)
