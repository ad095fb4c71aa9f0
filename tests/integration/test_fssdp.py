"""FSSDP equals one process: random copies at every step, whatever holds them and however they come and go.

Every step has another random placement of copies, with rows divided by every kind of rule; with calibration further copies
come once a layer has routed, whatever they cost. float64 to 1e-10: first
gradients, clipped; norm; counts exactly; parameters after 20 steps of AdamW (6 with calibration) against one process.
"""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moetrain.errors import PeerError
from moetrain.comm.sparse.packed import Packed
from moetrain.moe.bank import MATRICES, PIECES
from moetrain.ops import grouped_experts
from moetrain.plan.calibrate import extended
from moetrain.plan.costs import Topology
from moetrain.plan.memory import CopyMemory, copy_memory, held_at
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import LayerPlan
from moetrain.train.checkpoint.reader import load, resume
from moetrain.train.checkpoint.writer import save
from moetrain.train.evaluate import evaluate
from moetrain.train.planning import Planning
from moetrain.train.setup import Run
from moetrain.train.step import train_step
from tests.integration.training import FORCED, Trained, alone, difference, make_run, train_run, union, whole
from tests.train.test_state import unsaved

STEPS = 20


class Random:
    """A planner that copies and moves homes at random, by the loads it is given."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def plan(self, loads, homes, topology, costs, room) -> LayerPlan:
        draw = random.Random(f"{self.seed}/{loads.tolist()}")
        pairs = [(expert, at) for expert, home in enumerate(homes.home) for at in range(homes.positions) if at != home]
        copies = draw.sample(pairs, draw.choice([0, 1, len(pairs) // 3, len(pairs)]))
        placement = LayerPlacement(homes.home, homes.positions, tuple(copies))
        self.rule = draw.choice(["local_first", "waterfill", "shares"])
        return LayerPlan(placement, tuple(draw.choice([0, 1, 7]) for _ in placement.replicas))

    def rehome(self, loads, placement, topology, costs) -> ExpertPlacement:
        """Any home for every expert."""
        draw = random.Random(f"{self.seed}/{[layer.tolist() for layer in loads.values()]}")
        return ExpertPlacement(tuple((name, LayerPlacement(tuple(draw.randrange(layer.positions) for _ in layer.home),
                                                           layer.positions)) for name, layer in placement.layers))


def run_with_copies(overrides: list[str], forced=None, seed: int = 0) -> Run:
    """Two ranks a node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        run = make_run(overrides, forced)
    planning = run.state.planning
    assert planning.surroundings.topology == Topology(run.mesh["ep"].size, 2)
    planning.planner = Random(seed)
    planning.surroundings = planning.surroundings._replace(room=8)
    planning.calibration = planning.calibration and extended         # every missing copy, never mind the price
    return run


def train_with_copies(overrides: list[str], steps: int, forced, seed: int) -> Trained:
    run = run_with_copies(overrides, forced, seed)
    planning = run.state.planning
    sliced = set()

    def adopt(placement, original=planning.copies.adopt):
        sliced.update(layer.sliced for _, layer in placement.layers)
        original(placement)

    planning.copies.adopt = adopt
    planning.restored()                                  # copies from the first step on
    trained = train_run(run, steps)
    if run.config.parallel.sliced and not forced:
        assert len(sliced) > 2, sliced                   # other experts lie in pieces in mid-run
    return trained


@cache
def truth(extra: tuple[str, ...], forced: bool, steps: int) -> Trained:
    return alone([*extra, "run.dtype=float64"], steps, FORCED if forced else None)


CALIBRATE = "parallel.calibrate=true"
CASES = {
    "two": (2, [], 1, False, []),
    "two, empty ranks": (2, [], 2, True, []),
    "four, accumulated": (4, [], 4, False, []),
    "four, empty ranks": (4, [], 1, True, ["parallel.shard=2"]),
    "replicated": (4, ["parallel.ep=2"], 2, False, []),
    "kept graphs gathered again": (2, ["parallel.rematerialize=true"], 4, False, []),
    "four gathered again": (4, ["parallel.rematerialize=true"], 2, True, []),
    "recomputed": (2, ["train.activation_checkpointing=full"], 2, False, []),
    "recomputed and gathered again": (4, ["train.activation_checkpointing=full", "parallel.rematerialize=true"], 2, False, []),
    "selective, count pass": (2, ["train.activation_checkpointing=selective", "train.count_pass=true",
                                  "parallel.rematerialize=true"], 4, False, []),
    "homes that move": (4, ["parallel.rehome_interval=3"], 2, False, []),
    "homes that move, Muon": (2, ["parallel.rehome_interval=4"], 1, False, ["optim=muon"]),
    "homes that move, replicated": (4, ["parallel.ep=2", "parallel.rehome_interval=5"], 2, True, []),
    "uneven homes": (4, [], 1, False, ["model.num_experts=[7,3]"]),
    "sliced": (4, ["parallel.sliced=3", "parallel.rehome_interval=4"], 2, False, []),
    "sliced, gathered again": (4, ["parallel.sliced=2", "parallel.rehome_interval=3", "parallel.rematerialize=true"], 2, True, []),
    "sliced, replicated": (4, ["parallel.sliced=9", "parallel.ep=2", "parallel.rehome_interval=7"], 1, True, []),
    "sliced, two levels": (4, ["parallel.sliced=2", "parallel.rehome_interval=5", "parallel.collective=two_level"], 1, False,
                           ["model.num_experts=[7,3]"]),
    "two levels": (4, ["parallel.collective=two_level", "parallel.rehome_interval=6"], 2, False, []),
    "two levels, gathered again": (4, ["parallel.collective=two_level", "parallel.rematerialize=true"], 2, True, []),
    "two levels, recomputed": (4, ["parallel.collective=two_level", "train.activation_checkpointing=full"], 2, False, []),
    "calibrated": (4, [CALIBRATE], 1, False, []),
    "calibrated, accumulated": (2, [CALIBRATE], 4, False, []),
    "calibrated, replicated": (4, [CALIBRATE, "parallel.ep=2"], 2, False, []),
    "calibrated, gathered again": (2, [CALIBRATE, "parallel.rematerialize=true"], 4, False, []),
    "calibrated, recomputed": (2, [CALIBRATE, "train.activation_checkpointing=full"], 4, False, []),
    "calibrated, recomputed and gathered again, replicated": (
        4, [CALIBRATE, "parallel.ep=2", "train.activation_checkpointing=full", "parallel.rematerialize=true"], 1, False, []),
    "calibrated, selective, count pass": (2, [CALIBRATE, "train.activation_checkpointing=selective", "train.count_pass=true",
                                              "parallel.rematerialize=true"], 2, False, []),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_copies_change_nothing(ranks, case):
    world, overrides, accumulation, forced, extra = CASES[case]
    overrides = ["parallel=fssdp", *overrides, *extra, "run.dtype=float64", f"run.nproc={world}",
                 f"train.micro_batch={16 // world // accumulation}"]
    steps = 6 if CALIBRATE in overrides else STEPS
    results = ranks(world).run(train_with_copies, overrides, steps, FORCED if forced else None, len(case))
    ours, added = union(results), [[step["moe/added_copies"] for step in result.metrics] for result in results]
    assert any(added[0]) == (CALIBRATE in overrides)
    assert (added[0] != added[-1]) == (CALIBRATE in overrides and "parallel.ep=2" in overrides)      # groups decide by themselves
    expected = truth(tuple(e for e in extra if e.startswith(("model", "optim"))), forced, steps)
    for what in ("gradients", "parameters"):
        error, name = difference(getattr(ours, what), getattr(expected, what))
        assert error <= 1e-10, f"{what}: {name} differs by {error:.3g} of its largest value"
    for mine, theirs in zip(ours.metrics, expected.metrics):
        for key in ("loss/ce", "loss/total", "loss/balance", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-10), key
    for mine, theirs in zip(ours.counts, expected.counts):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["four, accumulated", "four gathered again", "replicated", "recomputed"])
def test_first_gradients_in_float32_with_the_choices_fixed(ranks, case):
    """The path that ships: sums are grouped otherwise, and nothing else differs."""
    world, overrides, accumulation, _, extra = CASES[case]
    overrides = ["parallel=fssdp", *overrides, *extra, "run.dtype=float32", f"run.nproc={world}",
                 f"train.micro_batch={16 // world // accumulation}"]
    ours = union(ranks(world).run(train_with_copies, overrides, 1, FORCED, 1))
    error, name = difference(ours.gradients, alone(["run.dtype=float32"], 1, FORCED).gradients)
    assert error <= 1e-5, f"{name} differs by {error:.3g} of its largest value"


# --- memory


class Live(NamedTuple):
    """Bytes of copies whose storage is alive: after the forward passes, the most in backward, after the step. by_layer: those
    of one gathering."""

    forward: int
    backward: int
    end: int
    by_layer: list[int]


class EveryLayerOtherwise(Random):
    asked = 0

    def plan(self, loads, homes, topology, costs, room) -> LayerPlan:
        self.asked += 1
        return super().plan(loads + self.asked, homes, topology, costs, room)


def live(overrides: list[str]) -> Live:
    run = run_with_copies(overrides)
    run.state.planning.planner = EveryLayerOtherwise(3)
    run.state.planning.restored()
    layers = list(run.parallel.copies.layers.values())
    gathered: list[tuple[StorageWeakRef, int]] = []
    seen = {"most": 0, "forward": 0}

    def alive() -> int:
        return sum({ref.cdata: nbytes for ref, nbytes in gathered if not ref.expired()}.values())

    def watched(matrices, layer):
        def matrices_of_layer():
            views = matrices()
            gathered.append((StorageWeakRef(layer._rows_cW.untyped_storage()), layer._rows_cW.nbytes))
            seen["most"] = max(seen["most"], alive())
            return views

        return matrices_of_layer

    def total(*arguments, original=run.objective.total):
        seen["forward"], seen["most"] = seen["forward"] or alive(), 0
        return original(*arguments)

    for layer in layers:
        layer.matrices = watched(layer.matrices, layer)
    run.objective.total = total
    rows = 3 * run.config.model.dim * run.config.model.expert_dim * 8
    by_layer = [layer.lanes.copies * rows if layer.lanes else 0 for layer in layers]
    train_step(run, 1)
    return Live(seen["forward"], seen["most"], alive(), by_layer)


@pytest.mark.ranks
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_copies_are_released_where_backward_gathers_them_again(ranks, recompute):
    base = ["parallel=fssdp", "run.nproc=2", "run.dtype=float64", "model.num_layers=5", "train.micro_batch=4",
            f"train.activation_checkpointing={recompute}"]
    kept = ranks(2).run(live, base)
    assert all(rank.forward == sum(rank.by_layer) for rank in kept) and any(rank.forward for rank in kept)
    gathered_again = ranks(2).run(live, [*base, "parallel.rematerialize=true"])
    for rank in gathered_again:
        assert rank.forward == 0
        assert rank.backward <= max(map(sum, zip(rank.by_layer, [0, *rank.by_layer])))        # two neighbours
    assert all(rank.end == 0 for rank in kept + gathered_again)


def bytes_of_pieces(overrides: list[str]) -> tuple[list[tuple[int, ...]], int, int]:
    """After rehomes: sliced experts by layer; bytes of parameters, gradients and moments in pieces here, and of those of experts
    that lie here whole."""
    run = run_with_copies(overrides)
    train_step(run, 1)
    train_step(run, 2)
    banks = [block.moe.experts.bank for block in run.state.model.layers]
    for bank, loads_E in zip(banks, run.state.planning.outlook.loads().values()):
        assert bank.sliced == tuple(sorted(sorted(range(8), key=lambda expert: (-int(loads_E[expert]), expert))[:3]))  # noqa: B023
    train_step(run, 3)

    def nbytes(names: tuple[str, ...]) -> int:
        parameters = [getattr(bank, name) for bank in banks for name in names]
        moments = [run.state.optimizer.state[parameter] for parameter in parameters]
        kept = [*parameters, *(state[name] for state in moments for name in ("exp_avg", "exp_avg_sq"))]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept) + sum(parameter.grad.nbytes for parameter in parameters)

    assert all(torch.equal(run.state.optimizer.state[getattr(bank, name)]["step"], torch.tensor(3.)) for bank in banks for name in PIECES)
    return [bank.sliced for bank in banks], nbytes(PIECES), nbytes(MATRICES)


@pytest.mark.ranks
def test_a_position_holds_its_part_of_a_sliced_expert_and_no_more(ranks):
    overrides = ["parallel=fssdp", "run.nproc=4", "train.micro_batch=4", "parallel.sliced=3", "parallel.rehome_interval=2"]
    results = ranks(4).run(bytes_of_pieces, overrides)
    sliced = results[0][0]
    assert all(len(experts) == 3 for experts in sliced) and all(result[0] == sliced for result in results)
    expert = 4 * 4 * 3 * 16 * 16                         # four tensors of 3 D F float32 numbers
    assert {result[1] for result in results} == {2 * 3 * expert // 4}
    assert sum(result[2] for result in results) == 2 * (8 - 3) * expert


class Seen:
    """Storages by kind, and the most bytes of a kind that were alive at any time something was added."""

    def __init__(self) -> None:
        self.known: dict[str, dict[int, tuple[StorageWeakRef, int]]] = {name: {} for name in CopyMemory._fields}
        self.most = dict.fromkeys(CopyMemory._fields, 0)

    def add(self, kind: str, tensor: torch.Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.known[kind][reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.known[kind] = {at: found for at, found in self.known[kind].items() if not found[0].expired()}
        self.most[kind] = max(self.most[kind], sum(nbytes for _, nbytes in self.known[kind].values()))


def predicted_and_seen(overrides: list[str]) -> tuple[CopyMemory, CopyMemory]:
    """Bytes of a step with copies, by the formulas and by the lifetime of storages."""
    run = run_with_copies(overrides)
    run.state.planning.planner = EveryLayerOtherwise(3)
    run.state.planning.restored()
    seen, gather, reduce, cast, position = Seen(), Packed.post_gather, Packed.post_reduce, grouped_experts._cast, run.mesh["ep"].position

    def gathered(lanes, *arguments):
        flight = gather(lanes, *arguments)
        seen.add("copies", flight.result), seen.add("sending", flight.message)
        return flight

    def reduced(lanes, gradients_cW, *arguments):
        flight = reduce(lanes, gradients_cW, *arguments)
        seen.add("sums", gradients_cW), seen.add("returned", flight.result)
        return flight

    def laid(homes, copies, dtype):
        side_by_side = cast(homes, copies, dtype)
        if copies is not None and len(copies):
            seen.add("beside", side_by_side)
        return side_by_side

    layers = [held_at(layer, position) for _, layer in run.state.planning.placement.layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "post_gather", gathered)
        patch.setattr(Packed, "post_reduce", reduced)
        patch.setattr(grouped_experts, "_cast", laid)
        train_step(run, 1)
    model = run.config.model
    predicted = copy_memory(layers, 3 * model.dim * model.expert_dim, weight=run.state.model.dtype.itemsize, gradient=4,
                            rematerialize=run.config.parallel.rematerialize,
                            recompute=run.config.train.activation_checkpointing != "none")
    return predicted, CopyMemory(**seen.most)


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [
    ["run.dtype=bfloat16"], ["parallel.rematerialize=true"],
    ["parallel.rematerialize=true", "train.activation_checkpointing=full", "run.dtype=bfloat16"]], ids=" ".join)
def test_the_memory_of_copies_is_as_predicted(ranks, overrides):
    results = ranks(2).run(predicted_and_seen, ["parallel=fssdp", "run.nproc=2", "model.num_layers=5", "train.micro_batch=4", *overrides])
    assert all(predicted == seen for predicted, seen in results), results
    assert all(max(predicted[part] for predicted, _ in results) for part in range(5))


# --- calibration


def bits_of(overrides: list[str], whole: bool) -> tuple[dict[str, bytes], int]:
    """State after three steps with some copies: all of them planned, or some of them after the gate; and how many these were."""
    run, wanted = run_with_copies(overrides), ((0, 1), (1, 1), (2, 1), (5, 0), (7, 0))
    planning = run.state.planning
    planning.planner = Chosen(wanted if whole else wanted[1::2])

    def calibration(n_PE, plan, *others):
        assert int(n_PE.sum()) == 16 * 12 * 2                            # the step's rows, of which a micro-batch has half
        return None if whole else LayerPlan(LayerPlacement(plan.placement.home, plan.placement.positions, wanted))

    planning.calibration = calibration
    planning.restored()
    added = [train_step(run, step).metrics["moe/added_copies"] for step in (1, 2, 3)]
    return bits(run), sum(added)


class Chosen:
    rule = "local_first"

    def __init__(self, copies: tuple[tuple[int, int], ...]) -> None:
        self.copies = copies

    def plan(self, loads, homes, topology, costs, room) -> LayerPlan:
        return LayerPlan(LayerPlacement(homes.home, homes.positions, self.copies))


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [[], ["parallel.rematerialize=true"]], ids=["kept", "gathered again"])
def test_copies_that_come_after_the_gate_give_the_bits_of_copies_that_were_planned(ranks, overrides):
    overrides = ["parallel=fssdp", CALIBRATE, "run.nproc=2", "train.micro_batch=4", "run.dtype=float32", *overrides]
    planned, added = (ranks(2).run(bits_of, overrides, whole) for whole in (True, False))
    assert [state for state, _ in planned] == [state for state, _ in added]
    assert [count for _, count in planned] == [0, 0] and [count for _, count in added] == [3 * 2 * 3] * 2


def added_where_it_pays(overrides: list[str], forced, seconds: float) -> list[int]:
    """Copies added in two steps by the model of time, where every row takes so long to compute."""
    run = make_run(overrides, forced)
    planning = run.state.planning
    planning.surroundings = planning.surroundings._replace(costs=replace(planning.surroundings.costs, row_s=seconds))
    counts = []
    for step in (1, 2):
        counts.append(int(train_step(run, step).metrics["moe/added_copies"]))
        evaluate(run.state.model, run.dataset, run.mesh, run.config)            # never adds
        assert run.parallel.copies.added == counts[-1]
    return counts


@pytest.mark.ranks
def test_what_nobody_expected_is_calibrated_and_what_was_planned_is_not(ranks):
    """All tokens take experts of one rank: unknown before the first step, forecast for the second."""
    overrides = ["parallel=fssdp", CALIBRATE, "run.nproc=2", "train.micro_batch=4", "eval.windows=2", "parallel.room=2"]
    for counts in ranks(2).run(added_where_it_pays, overrides, FORCED, 1.0):
        assert counts[0] > 0 and counts[1] == 0
    assert ranks(2).run(added_where_it_pays, overrides, FORCED, 1e-12) == [[0, 0], [0, 0]]


# --- plans that differ


def with_corrupted_loads(overrides: list[str]) -> tuple[str, int]:
    """(the error, collectives posted after it) where rank 1 has counted wrong."""
    run = run_with_copies(overrides)
    train_step(run, 1)
    if run.mesh.rank == 1:
        run.state.planning.outlook.forecast.loads_wL += 1
    run.state.planning._plan()
    posted = []
    for layer in run.parallel.copies.layers.values():
        layer.post = lambda: posted.append(1)
    try:
        train_step(run, 2)
    except PeerError as error:
        return str(error), len(posted)
    return "", len(posted)


@pytest.mark.ranks
def test_ranks_that_plan_otherwise_are_named_before_anything_is_posted(ranks):
    for error, posted in ranks(4).run(with_corrupted_loads, ["parallel=fssdp", "run.nproc=4", "train.micro_batch=4"]):
        assert error.startswith("E-PEER-002") and "rank 1 differs" in error and posted == 0


# --- checkpoints and resuming


SLICED = ["parallel.sliced=3", "parallel.collective=two_level"]      # which groups sums otherwise than pieces do


def resumed(overrides: list[str], directory: Path) -> tuple[list, list]:
    """Metrics and state at the end of 10 steps: in one go, and by a run that loads what the first saved after 6."""
    run = run_with_copies(overrides)
    first = []
    for step in range(1, 11):
        first.append(numbers(train_step(run, step).metrics))
        if step == 6:
            path = save(run.state, directory, run.mesh, {})
    again = run_with_copies(overrides)
    load(again.state, path, mesh=again.mesh)
    second = [numbers(train_step(again, step).metrics) for step in range(7, 11)]
    return [first[6:], bits(run)], [second, bits(again)]


def numbers(metrics: dict[str, float]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in metrics.items() if not name.startswith(("time/", "through", "memory"))}


def bits(run: Run) -> dict[str, bytes]:
    return {piece.name: piece.rows.detach().contiguous().view(torch.uint8).numpy().tobytes() for piece in run.state.pieces()}


@pytest.mark.ranks
@pytest.mark.parametrize("forget, more", [
    ("", []), ("plan.loads", []), ("plan.homes", []), ("", SLICED), ("plan.sliced", SLICED),
    ("", ["parallel.forecast=trend", "parallel.fallback=30", CALIBRATE]),
    ("plan.slope", ["parallel.forecast=trend"]), ("plan.errors", ["parallel.fallback=30"])])
def test_resuming_gives_the_same_bits_and_needs_forecast_and_homes(ranks, tmp_path, forget, more):
    overrides = ["parallel=fssdp", "run.nproc=4", "train.micro_batch=2", "parallel.rehome_interval=3", "run.dtype=float32", *more]
    for unbroken, again in ranks(4).run(resumed_without, overrides, tmp_path, forget):
        assert (unbroken == again) == (not forget)


def resumed_without(overrides: list[str], directory: Path, forget: str) -> tuple[list, list]:
    def pieces(planning, original=Planning.pieces):
        yield from (piece for piece in original(planning) if piece.name != forget)

    original, Planning.pieces = Planning.pieces, pieces
    try:
        return resumed(overrides, directory)
    finally:
        Planning.pieces = original


def save_moved(overrides: list[str], run_dir: Path) -> dict:
    run = run_with_copies(overrides)
    for step in range(1, 4):
        train_step(run, step)
    save(run.state, run_dir, run.mesh, {})
    return held(run)


def load_elsewhere(overrides: list[str], run_dir: Path) -> dict:
    run = make_run(overrides)
    resume(run.state, run_dir, run.mesh)
    return held(run)


def held(run: Run) -> dict:
    return {piece.name: (tuple(piece.shape), piece.begin, piece.rows.detach().clone()) for piece in run.state.pieces()
            if not piece.name.startswith("plan.")}


SLICED4 = (4, ["parallel=fssdp", "parallel.sliced=3", "parallel.rehome_interval=2"])
ELSEWHERE = {"single": (1, []), "ep2": (2, ["parallel=ep"]), "ep2_fsdp4": (4, ["parallel=ep_fsdp", "parallel.ep=2"]),
             "fsdp4": (4, ["parallel=fsdp"]), "fssdp4": (4, ["parallel=fssdp"]), "fssdp2": (2, ["parallel=fssdp"]), "sliced4": SLICED4,
             "sliced2": (2, [*SLICED4[1], "parallel.sliced=1"])}


@pytest.mark.ranks
@pytest.mark.parametrize("sliced", [0, 3])
def test_a_checkpoint_of_homes_that_moved_loads_anywhere_to_the_bit(ranks, tmp_path, sliced):
    moved = ["parallel=fssdp", "run.nproc=4", "train.micro_batch=4", "parallel.rehome_interval=2", f"parallel.sliced={sliced}"]
    held_by = ranks(4).run(save_moved, moved, tmp_path)
    in_pieces = {name for held in held_by for name, (shape, _, rows) in held.items() if "experts" in name and len(rows) < shape[0]}
    assert len(in_pieces) == 2 * sliced * 2 * 3          # layers, matrices, parameter and moments
    truth = whole(held_by)
    for name, (world, overrides) in ELSEWHERE.items():
        overrides = [*overrides, f"run.nproc={world}", f"train.micro_batch={16 // world}"]
        loaded = whole([load_elsewhere(overrides, tmp_path)] if world == 1 else ranks(world).run(load_elsewhere, overrides, tmp_path))
        assert loaded.keys() == truth.keys()
        assert all(torch.equal(loaded[tensor], truth[tensor]) for tensor in truth), name


def unsaved_with_copies(overrides: list[str]) -> list[str]:
    return [path for path in unsaved(run_with_copies(overrides)) if not path.endswith("planner.rule")]       # Random's own


@pytest.mark.ranks
@pytest.mark.parametrize("more", [[], ["parallel.sliced=2"], [CALIBRATE, "parallel.forecast=trend"]], ids=["planned", "sliced", "calibrated"])
def test_what_a_step_with_copies_changes_is_saved_or_rebuilt(ranks, more):
    assert ranks(2).run(unsaved_with_copies, ["parallel=fssdp", "parallel.shard=1", "run.nproc=2", "train.micro_batch=4",
                                              "parallel.rehome_interval=2", *more]) == [[], []]
