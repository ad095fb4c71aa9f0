"""Invariants of the balance loss under every split of a batch.

Those that tests/integration/test_balance.py asserts are not repeated here.
docs/explanation/balance.md names for every invariant the test that asserts it.
"""

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor

from moetrain.comm.reduce import sum_over
from moetrain.data.batches.batch import Batch
from moetrain.data.loader import Loader
from moetrain.errors import NonFiniteError
from moetrain.routers import base
from moetrain.routers.base import RouterContext
from moetrain.routers.stack import stacks
from moetrain.train.count_pool import AccumulatedCounts, CountAllReduce, PreviousStepCounts
from moetrain.train.evaluation.evaluate import evaluate
from moetrain.train.metrics import pool
from moetrain.train.micro_batches import step_context
from moetrain.train.step import train_step
from tests.support.balance_oracle import BASE, WORLDS, steps, truth
from tests.support.training import FORCED, difference, make_run, snapshot, whole

GLOBAL = [*BASE, "loss.z.weight=0"]
WEIGHT = ["balance.weight=0.3"]                          # of a scope that is chosen after BASE
ALL = {
    "exact": [], "count pass": ["train.count_pass=true"], "sync": ["balance.mode=sync"],
    "buffer": ["balance.mode=buffer"],
    "warm": ["balance.mode=warm", "balance.drift=1"], "node": ["balance=node", *WEIGHT],
    "micro": ["balance=micro", *WEIGHT],
    "sequence": ["balance=sequence", *WEIGHT],
}


def split(world: int, turns: int) -> list[str]:
    return [*WORLDS[world], f"train.micro_batch={16 // world // turns}"]


def run_on(ranks, world: int, function, *arguments) -> list:
    return [function(*arguments)] if world == 1 else ranks(world).run(function, *arguments)


# --- ranks x accumulation (with 4 turns: test_balance.py)


@pytest.mark.ranks
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("turns", [1, 2])
def test_exact_gives_what_the_oracle_gives_under_any_accumulation(ranks, world, turns):
    results = run_on(ranks, world, steps, [*BASE, *split(world, turns)], world)
    for step, of_step in enumerate(zip(*results), 1):
        grads, counts, balance = truth(whole([rank[3] for rank in of_step]), step, lambda b: range(16), None)
        assert difference(whole([rank[0] for rank in of_step]), grads)[0] <= 1e-10
        for _, ours, reported, _ in of_step:
            assert [count.tolist() for count in ours.values()] == [count.tolist() for count in counts]
            assert reported == pytest.approx(balance, rel=1e-12)


def hidden_gradients(overrides: list[str]) -> tuple[dict[tuple[int, int], Tensor], dict]:
    """Gradients of the first step: at the input of every router, by layer and sample; at the parameters."""
    run, found = make_run(overrides), {}

    def watch(layer: int):
        def before(_, arguments):
            x_TD, context = arguments[:2]
            ids_BS = context.sample_ids_T.view(-1, 12)
            x_TD.register_hook(lambda grad: found.update(
                {(layer, int(ids[0])): part.clone() for ids, part in zip(ids_BS, grad.split(12))}))
        return before

    for layer, block in enumerate(run.state.model.layers):
        block.moe.register_forward_pre_hook(watch(layer))
    train_step(run, 1)
    return found, snapshot(run, lambda p: p.grad)


@pytest.mark.ranks
def test_hidden_states_and_routers_get_the_same_gradient_in_every_split(ranks):
    results = {(world, turns): run_on(ranks, world, hidden_gradients, [*GLOBAL, *split(world, turns)])
               for world, turns in ((1, 1), (1, 8), (2, 4), (4, 2))}
    hidden, parameters = results.pop((1, 1))[0]
    assert len(hidden) == 2 * 16 and max(grad.abs().max() for grad in hidden.values()) > 1e-3
    for of_split in results.values():
        theirs = {key: grad for found, _ in of_split for key, grad in found.items()}
        assert theirs.keys() == hidden.keys()
        scale = max(grad.abs().max() for grad in hidden.values())
        assert max((theirs[key] - grad).abs().max() for key, grad in hidden.items()) <= 1e-10 * scale
        assert difference(whole([held for _, held in of_split]), whole([parameters]))[0] <= 1e-10


# --- micro-batches that are alike


def alike(overrides: list[str], turns: int) -> dict:
    """Gradients of the second step, where every micro-batch of every rank is the same single sequence.

    No step changes the parameters.
    """
    run = make_run(overrides)
    dataset = run.loader._dataset
    batch = dataset.batch(dataset.sample_ids(1, range(1)))
    run.loader.step, run.state.optimizer.step = lambda step: [batch] * turns, lambda: None
    train_step(run, 1)
    train_step(run, 2)
    return snapshot(run, lambda p: p.grad)


@pytest.mark.ranks
def test_where_micro_batches_are_alike_every_scope_and_mode_is_the_same(ranks):
    """Also warm: the step before had these counts. A factor that belongs to one scope alone would show."""
    one = whole([alike([*GLOBAL, *ALL["micro"]], 1)])
    router = one["layers.0.moe.router.weight"]
    without = whole([alike([*GLOBAL, "balance=none", "~balance.weight"], 1)])["layers.0.moe.router.weight"]
    assert (router - without).abs().max() > 0.1 * router.abs().max()
    for name, overrides in ALL.items():
        for world in (1, 2):
            results = run_on(ranks, world, alike,
                             [*GLOBAL, *WORLDS[world], "train.micro_batch=4", *overrides], 2)
            error, where = difference(whole(results), one)
            assert error <= 1e-12, f"{name} on {world}: {where} differs by {error:.3g}"


def test_where_turns_have_the_shares_of_the_step_before_all_modes_are_one():
    share_E, turns, tokens = torch.tensor([5, 1, 0, 2]), 4, torch.tensor(16)
    prior = PreviousStepCounts({"": 4}, 0.3, torch.device("cpu"))
    prior.observe(4 * share_E, tokens)
    for mode in ("sync", "buffer", "warm"):
        known = AccumulatedCounts(mode, {"": 4}, tokens, prior)
        for turn in range(1, turns + 1):
            f_E = known.add(share_E.clone(), last=turn == turns).double()
            torch.testing.assert_close(f_E / f_E.sum(), share_E.double() / 8, rtol=0, atol=1e-15)


# --- padding


# The batches of one sequence whose counts are f of batch b
PADDED = {
    "exact": lambda b: range(16), "count pass": lambda b: range(16),
    "sync": lambda b: range(b // 8 * 8, b // 8 * 8 + 8),
    "buffer": lambda b: range(b // 8 * 8 + 8), "micro": lambda b: range(b // 4 * 4, b // 4 * 4 + 4),
    "sequence": lambda b: [b],
}


def padded_step(overrides: list[str]) -> tuple[dict, dict, dict]:
    """(gradients, parameters before, metrics) of a step where rank 1 has nothing in its first micro-batch."""
    run = make_run(overrides)
    load, before = run.loader.step, snapshot(run, lambda p: p.data)

    def step(number: int) -> list:
        first, *rest = load(number)
        return [emptied(first) if run.mesh.rank == 1 else first, *rest]

    run.loader.step = step
    metrics = train_step(run, 1).metrics
    return snapshot(run, lambda p: p.grad), before, metrics


def emptied(batch: Batch) -> Batch:
    return batch._replace(tokens_BS=batch.tokens_BS * 0, targets_BS=batch.targets_BS * 0 - 1,
                          valid_BS=batch.valid_BS & False)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", PADDED)
def test_a_micro_batch_of_padding_alone_adds_nothing(ranks, mode, monkeypatch):
    results = ranks(2).run(padded_step, [*BASE, *split(2, 2), *ALL[mode]])
    load = Loader.step
    monkeypatch.setattr(Loader, "step", lambda self, step: [             # slots 4 to 7 are rank 1's first
        emptied(batch) if number in range(4, 8) else batch for number, batch in enumerate(load(self, step))])
    grads, _, balance = truth(whole([before for _, before, _ in results]), 1, PADDED[mode], None)
    assert difference(whole([found for found, _, _ in results]), grads)[0] <= 1e-10
    for _, _, metrics in results:
        assert (metrics["loss/balance"] == pytest.approx(balance, rel=1e-12)
                and math.isfinite(metrics["loss/total"]))


# --- tokens of a sequence on several ranks


def routed_part(mode: str, world: int) -> tuple[list[Tensor], dict[int, Tensor], float]:
    """Run two routers on this rank's stretch of the positions of every sequence.

    Returns:
        Counts and the gradients, summed over ranks, of both weights; gradients at the hidden states, by first
        position; the loss.
    """
    # The mesh and the loss; its batches are not used
    run = make_run([*BASE, *WORLDS[world], "train.micro_batch=4", *ALL[mode]])
    group, generator = run.mesh["batch"], torch.Generator().manual_seed(5)
    moes = [block.moe for block in run.state.model.layers]
    x_BSD, valid_BS = (torch.randn(4, 12, 16, dtype=torch.float64, generator=generator),
                       torch.rand(4, 12, generator=generator) > 0.2)
    here = torch.arange(12).chunk(world)[group.position]
    x_TD, valid_T = x_BSD[:, here].flatten(0, 1).requires_grad_(), valid_BS[:, here].flatten()
    stats = {moe.name: moe.router.route(x_TD, RouterContext(valid_T=valid_T)).stats for moe in moes}
    pooling, tokens, found = (CountAllReduce(group, run.state.model.num_choices, run.mesh.device),
                              valid_BS.sum(), stacks(stats))
    counted = pooling.micro_batch()
    for router, of_router in stats.items():
        counted(router, of_router)
    counts_L = pooling.wait()
    share = run.objective.share(torch.zeros((), dtype=torch.float64), found,
                                pool(counts_L, run.state.model.num_choices, tokens), tokens)
    total = share.total
    total.backward()
    grads = [sum_over(group, moe.router.weight.grad) for moe in moes]
    return ([counts_L, *grads], {int(here[0]): x_TD.grad.view(4, len(here), 16)},
            sum_over(group, total.detach()).item())


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 4])
def test_sequences_cut_up_between_ranks_have_the_counts_and_gradients_of_whole_ones(ranks, world):
    whole_numbers, whole_grads, whole_loss = routed_part("exact", 1)
    at = {}
    for numbers, grads, loss in ranks(world).run(routed_part, "exact", world):
        assert numbers[0].equal(whole_numbers[0]) and loss == pytest.approx(whole_loss, rel=1e-12)
        for ours, truth_ED in zip(numbers[1:], whole_numbers[1:]):
            torch.testing.assert_close(ours, truth_ED, rtol=1e-10, atol=1e-14)
        at |= grads
    torch.testing.assert_close(torch.cat([at[first] for first in sorted(at)], 1), whole_grads[0], rtol=1e-10,
                               atol=1e-14)


# --- what counts are, and what leaves them alone


def test_counts_are_whole_in_a_model_that_was_cast_to_bfloat16():
    """bfloat16 has whole numbers up to 256."""
    run = make_run(["balance.mode=warm", "train.seq_len=301"], FORCED)
    run.state.model.to(torch.bfloat16)
    batch = run.loader.step(1)[0]
    output = run.state.model(batch.tokens_BS, step_context(0, 1, batch))
    for name, experts in FORCED.items():
        counts_E = output.stats[name].counts_E
        assert (counts_E.dtype == torch.int64 and counts_E[experts].tolist() == [16 * 301, 16 * 301]
                and counts_E.sum() == 2 * 16 * 301)
    assert all(shard.rows.dtype == torch.int64 for shard in run.state.prior.state_shards())


def test_counts_of_routers_that_run_again_are_not_those_of_the_step(monkeypatch):
    """Counts taken inside the router double when it is recomputed: the defect.

    Ours, beside it, leave with the first forward.
    """
    inside, sums = {"none": 0, "full": 0}, base.router_sums
    for mode in inside:
        def counted(*arguments, mode=mode):
            found = sums(*arguments)
            inside[mode] += int(found.counts_E.sum())
            return found

        monkeypatch.setattr(base, "router_sums", counted)
        counts = train_step(
            make_run([*BASE, "train.micro_batch=4", f"train.activation_checkpointing={mode}"]), 1).counts
        assert (sum(int(n_E.sum()) for n_E in counts.values()) == inside[mode]) == (mode == "none")
    assert inside["full"] == 2 * inside["none"]


@pytest.mark.parametrize("mode", ["exact", "count pass", "buffer"])
def test_blocks_that_run_again_say_their_counts_once(mode):
    counts = [train_step(make_run([*BASE, "train.micro_batch=4",
                                   f"train.activation_checkpointing={checkpointing}", *ALL[mode]]), 1).counts
              for checkpointing in ("none", "full")]
    assert ({name: of.tolist() for name, of in counts[0].items()}
            == {name: of.tolist() for name, of in counts[1].items()})


def left_behind(overrides: list[str]) -> list[bool]:
    """Which of the sums of a step are still there after it."""
    run, micro_batch, found = make_run(overrides), CountAllReduce.micro_batch, []
    CountAllReduce.micro_batch = lambda self: found.append(weakref.ref(self)) or micro_batch(self)
    try:
        train_step(run, 1)
    finally:
        CountAllReduce.micro_batch = micro_batch
    gc.collect()
    return [pooling() is not None for pooling in found]


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["exact", "count pass", "buffer"])
def test_a_step_of_blocks_that_run_again_leaves_no_graph(ranks, mode):
    """A sum posted inside such a block knows its hooks, they know the graph, and the graph knew the sum.

    Seen with homes that move.
    """
    overrides = [*BASE, *WORLDS[2], "train.micro_batch=4", "train.activation_checkpointing=full", *ALL[mode]]
    for left in ranks(2).run(left_behind, overrides):
        assert left == [False, False]


def test_an_evaluation_between_two_steps_changes_no_bit_of_the_second():
    overrides = ["balance.mode=warm", "balance.drift=1", "train.micro_batch=4", "eval.windows=4"]
    found = []
    for evaluated in (False, True):
        run = make_run(overrides)
        train_step(run, 1)
        if evaluated:
            evaluate(run.state.model, run.dataset, run.mesh, run.config, step=run.state.step)
        found.append((train_step(run, 2).metrics["loss/total"].hex(), snapshot(run, lambda p: p.grad)))
    (plain, plain_grads), (after, after_grads) = found
    assert plain == after and difference(whole([after_grads]), whole([plain_grads]))[0] == 0


def test_a_step_that_was_not_applied_leaves_no_counts():
    run = make_run(["balance.mode=warm", "train.micro_batch=4"])
    train_step(run, 1)
    before = [shard.rows.clone() for shard in run.state.prior.state_shards()]
    run.state.model.head.data[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        train_step(run, 2)
    after = run.state.prior.state_shards()
    assert all(shard.rows.equal(held) for shard, held in zip(after, before, strict=True))


# --- memory


class Saved:
    """Bytes that autograd keeps, as they come and go; a storage that is saved twice counts once."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.bytes = self.most = 0

    def pack(self, tensor: Tensor) -> "OpRecord":
        return OpRecord(self, tensor)


class OpRecord:
    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor, storage = saved, tensor, tensor.untyped_storage()
        self.place = storage.data_ptr()
        saved.held[self.place] = saved.held.get(self.place, 0) + 1
        if saved.held[self.place] == 1:
            saved.bytes += storage.nbytes()
            saved.most = max(saved.most, saved.bytes)

    def __del__(self) -> None:
        self.saved.held[self.place] -= 1
        if self.saved.held[self.place] == 0:
            self.saved.bytes -= self.tensor.untyped_storage().nbytes()


def most_kept(*overrides: str) -> int:
    run, saved = make_run(["train.seq_len=64", *overrides]), Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        train_step(run, 1)
    return saved.most


def test_exact_with_a_count_pass_keeps_what_one_micro_batch_keeps():
    one = most_kept("balance=micro", "train.micro_batch=4")              # each runs backward before the next
    assert most_kept("train.count_pass=true", "train.micro_batch=4") <= 1.1 * one
    assert most_kept("train.micro_batch=4") > 3 * one                    # all graphs
