"""Activation checkpointing and the count pass: nothing is decided or counted twice, nothing else changes."""

import gc

import pytest
import torch

from moetrain.train.micro_batches import step_context
from moetrain.train.step import train_step
from tests.support.training import difference, make_run, train_steps, whole

ROUTED = ["run.dtype=float64", "data.min_length=0.3", "train.micro_batch=8"]
MODES = {
    "none": [], "selective": ["train.activation_checkpointing=selective"],
    "full": ["train.activation_checkpointing=full"],
    "count": ["train.count_pass=true"],
    "count-selective": ["train.count_pass=true", "train.activation_checkpointing=selective"],
    "count-full": ["train.count_pass=true", "train.activation_checkpointing=full"],
}


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often operators really ran: those that a record answers do not get here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_routes_a_second_time(mode):
    """Two micro-batches, two layers: four selections, four decisions, whatever is computed again."""
    run = make_run([*ROUTED, *MODES[mode]])
    with Counted() as counted:
        train_step(run, 1)
    assert counted.calls["moetrain.top_k.default"] == counted.calls["moetrain.decide.default"] == 4


def ep_calls(mode: str, extra: list[str]) -> dict[str, int]:
    """Exchanges of one step on this rank, by what travels; and how often the host reads counts."""
    run = make_run([*ROUTED, "run.nproc=2", "parallel=ep", "train.micro_batch=4", *MODES[mode], *extra])
    found: dict[str, int] = {}

    class Exchanges(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "all_to_all_single" in str(func):
                kind = "counts" if args[0].dtype == torch.int64 else "rows"
                found[kind] = found.get(kind, 0) + 1
            found["reads"] = found.get("reads", 0) + (func is torch.ops.moetrain.read_host.default)
            return func(*args, **(kwargs or {}))

    with Exchanges():
        train_step(run, 1)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("mode, rows", [("none", 16), ("selective", 16), ("full", 20), ("count", 20),
                                        ("count-full", 24)])
def test_counts_are_exchanged_and_read_once_and_rows_no_more_than_need_be(ranks, mode, rows):
    """2 micro-batches x 2 layers: 4 exchanges of counts; rows go there and back in forward and in backward.

    `full` sends the rows there once more. A count pass sends them there and back in all layers but the last.
    """
    for found in ranks(2).run(ep_calls, mode, []):
        assert found == {"counts": 4, "reads": 4, "rows": rows}


@pytest.mark.ranks
@pytest.mark.parametrize("mode, rows", [("none", 48), ("selective", 48), ("full", 60)])
def test_rows_of_no_chunk_return_for_nothing(ranks, mode, rows):
    """Three chunks, and a shared expert that runs while the last one is on its way back."""
    extra = ["schedule=fixed", "schedule.chunks=3", "model.num_shared_experts=1"]
    for found in ranks(2).run(ep_calls, mode, extra):
        assert found == {"counts": 4, "reads": 4, "rows": rows}


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_every_gradient_stays_the_same_to_the_last_bit(mode):
    plain, changed = (whole([train_steps([*ROUTED, *overrides], 2).parameters])
                      for overrides in ([], MODES[mode]))
    assert difference(changed, plain)[0] == 0.0


def test_backward_keeps_less():
    assert (kept_bytes("full") < 0.3 * kept_bytes("none")
            and kept_bytes("selective") < 0.8 * kept_bytes("none"))


def kept_bytes(mode: str) -> int:
    """Bytes of storage that a forward pass leaves for backward: saved by autograd, or held by a record."""
    run = make_run([*ROUTED, "train.micro_batch=16", "train.seq_len=64", *MODES[mode]])
    batch = run.loader.step(1)[0]
    before, saved = alive(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run.state.model(batch.tokens_BS, step_context(0, 1, batch))
    kept = {**saved, **alive()}
    return sum(size for place, size in kept.items() if place not in before) - output.logits_BSV.nbytes


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor object in Python holds, by address."""
    gc.collect()
    # Others have no memory
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
