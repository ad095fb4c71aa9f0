"""Memory of FSSDP: copies are released, pieces are parts, and formulas are what is allocated."""

from math import prod
from typing import NamedTuple

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moetrain.comm.sparse.packed import Packed
from moetrain.ops import grouped_experts
from moetrain.plan.cost.memory import CopyMemory, copy_memory, held_at
from moetrain.train.step import train_step
from tests.support.random_copies import EveryLayerOtherwise, run_with_copies


class Live(NamedTuple):
    """Bytes of copies whose storage is alive: after the forward passes, the most in backward, after the step.

    by_layer: those of one gathering.
    """

    forward: int
    backward: int
    end: int
    by_layer: list[int]


def live(overrides: list[str]) -> Live:
    run = run_with_copies(overrides)
    run.state.planning.planner = EveryLayerOtherwise(3)
    run.state.planning.restored()
    layers = list(run.parallel.copies.banks.values())
    gathered: list[tuple[StorageWeakRef, int]] = []
    seen = {"most": 0, "forward": 0}

    def alive() -> int:
        return sum({ref.cdata: nbytes for ref, nbytes in gathered if not ref.expired()}.values())

    def watched(values, layer):
        def values_of_layer():
            views = values()
            gathered.append((StorageWeakRef(layer._rows_cW.untyped_storage()), layer._rows_cW.nbytes))
            seen["most"] = max(seen["most"], alive())
            return views

        return values_of_layer

    def share(*arguments, original=run.objective.share):
        seen["forward"], seen["most"] = seen["forward"] or alive(), 0
        return original(*arguments)

    for layer in layers:
        layer.values = watched(layer.values, layer)
    run.objective.share = share
    rows = 3 * run.config.model.dim * run.config.model.expert_dim * 8
    by_layer = [layer.transfers.copies * rows if layer.transfers else 0 for layer in layers]
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
    """State of sliced and of whole experts on this position, after rehomes.

    Returns:
        Sliced experts by layer; bytes of parameters, gradients and moments in pieces here; bytes of those of
        experts that lie here whole.
    """
    run = run_with_copies(overrides)
    train_step(run, 1)
    train_step(run, 2)
    banks = [block.moe.experts.bank for block in run.state.model.layers]
    for bank, loads_E in zip(banks, run.state.planning.forecaster.loads().values()):
        assert bank.sliced == tuple(sorted(
            sorted(range(8), key=lambda expert: (-int(loads_E[expert]), expert))[:3]))  # noqa: B023
    train_step(run, 3)

    def nbytes(names: tuple[str, ...]) -> int:
        parameters = [bank.stacked(name) for bank in banks for name in names]
        moments = [run.state.optimizer.state[parameter] for parameter in parameters]
        kept = [*parameters, *(state[name] for state in moments for name in ("exp_avg", "exp_avg_sq"))]
        return (sum(tensor.untyped_storage().nbytes() for tensor in kept)
                + sum(parameter.grad.nbytes for parameter in parameters))

    assert all(torch.equal(run.state.optimizer.state[getattr(bank, name)]["step"], torch.tensor(3.))
               for bank in banks for name in bank.slices)
    return [bank.sliced for bank in banks], nbytes(banks[0].slices), nbytes(banks[0].names)


@pytest.mark.ranks
def test_a_position_holds_its_part_of_a_sliced_expert_and_no_more(ranks):
    overrides = ["parallel=fssdp", "run.nproc=4", "train.micro_batch=4", "parallel.max_sliced_experts=3",
                 "parallel.rehome_interval=2", "planner=eplb"]
    results = ranks(4).run(bytes_of_pieces, overrides)
    sliced = results[0][0]
    assert all(len(experts) == 3 for experts in sliced) and all(result[0] == sliced for result in results)
    expert = 4 * 4 * 3 * 16 * 16                         # four tensors of 3 D F float32 numbers
    assert {result[1] for result in results} == {2 * 3 * expert // 4}
    assert sum(result[2] for result in results) == 2 * (8 - 3) * expert


class Seen:
    """Storages by kind, and the most bytes of a kind that were alive at any time something was added."""

    def __init__(self) -> None:
        self.known: dict[str, dict[int, tuple[StorageWeakRef, int]]] = {
            name: {} for name in CopyMemory._fields}
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
    seen, gather, reduce, cast, position = (Seen(), Packed.post_gather, Packed.post_reduce,
                                            grouped_experts.homes_and_copies, run.mesh["ep"].position)

    def gathered(transfers, *arguments):
        pending = gather(transfers, *arguments)
        seen.add("copies", pending.result), seen.add("sending", pending.message)
        return pending

    def reduced(transfers, gradients_cW, *arguments):
        pending = reduce(transfers, gradients_cW, *arguments)
        seen.add("sums", gradients_cW), seen.add("returned", pending.result)
        return pending

    def laid(homes, copies, dtype):
        side_by_side = cast(homes, copies, dtype)
        if copies is not None and len(copies):
            seen.add("beside", side_by_side)
        return side_by_side

    parameters = [prod(shape) for shape in run.state.model.layers[0].moe.experts.bank.shapes]
    layers = [held_at(layer, position, parameters) for _, layer in run.state.planning.placement.layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "post_gather", gathered)
        patch.setattr(Packed, "post_reduce", reduced)
        patch.setattr(grouped_experts, "homes_and_copies", laid)
        train_step(run, 1)
    predicted = copy_memory(layers, weight=run.state.model.dtype.itemsize, gradient=4,
                            rematerialize=run.config.parallel.rematerialize,
                            recompute=run.config.train.activation_checkpointing != "none")
    return predicted, CopyMemory(**seen.most)


@pytest.mark.ranks
@pytest.mark.parametrize("overrides", [
    ["run.dtype=bfloat16"], ["parallel.rematerialize=true"],
    ["parallel.rematerialize=true", "train.activation_checkpointing=full", "run.dtype=bfloat16"]],
                         ids=" ".join)
def test_the_memory_of_copies_is_as_predicted(ranks, overrides):
    results = ranks(2).run(predicted_and_seen, ["parallel=fssdp", "run.nproc=2", "model.num_layers=5",
                                                "train.micro_batch=4", *overrides])
    assert all(predicted == seen for predicted, seen in results), results
    assert all(max(predicted[part] for predicted, _ in results) for part in range(5))
