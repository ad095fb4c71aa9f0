"""Evaluation of held-out loss by domain, and of each router's choices by domain.

Of many domains the largest are evaluated by name and the rest as one (data/batches/evaluated_domains.py).
Windows of all domains are read together, `eval.batch` at once, and spread over the ranks of `batch`. Every
rank runs the same number of forward passes, with padding where it has no window left, so that expert
parallelism never waits for a rank that has finished. The state of the run does not change.

    loss/<domain>            nats per scored token, of cross-entropy whatever loss the run trains on
    nats_per_byte/<domain>   nats per byte of text, comparable across tokenizers; absent where unknown
    …/mean                   unweighted mean over domains

With `log.routing` the probe of routing.py sees every decision.

Shapes: B windows, M parts that are measured (domains, or the rest as one), L experts of all routers.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.comm.agreement import all_or_none
from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import largest_over, sum_over
from moetrain.config.schema import Config
from moetrain.data.batches.batch import Batch, Dataset, padding
from moetrain.losses.language import cross_entropy_sum
from moetrain.model.transformer import ModelOutput, Transformer
from moetrain.ops.pinned import to_device
from moetrain.routers.base import RouterContext
from moetrain.routers.context import refuse_unknown
from moetrain.runs.routing_record import RoutingRecord
from moetrain.train.evaluation.routing import RoutingProbe
from moetrain.train.micro_batches import step_context

_FIGURES = 4  # values of a part: nats, scored tokens, bytes of text, and how often these are unknown


class Evaluation(NamedTuple):
    """Result of an evaluation."""

    losses: dict[str, float]
    choices_ML: Tensor  # int64, used slots by part of Dataset.measured and by expert, routers in layer order
    routing: RoutingRecord | None = None  # with log.routing, of a model with routers


@torch.no_grad()
def evaluate(model: Transformer, dataset: Dataset, mesh: Mesh, config: Config, *, step: int,
             own_domains: bool = True, stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
    """Evaluate a model on the held-out windows of a dataset. Collective.

    Args:
        model: the model; it is in training mode afterwards.
        dataset: the held-out windows.
        mesh: all ranks.
        config: the run's config, with section `eval`.
        step: last step that trained the model, by which routers keep their schedules.
        own_domains: whether the domains are those that the run was trained on; routers are told of no others.
        stop: called before each forward pass; True on a rank ends the evaluation.

    Returns:
        The result; None where the evaluation was stopped.
    """
    def told(batch: Batch) -> RouterContext:
        own = step_context(config.run.seed, step, batch, training=False, per_sequence=True)
        return own if own_domains else own._replace(domains_T=None)

    if not own_domains:
        refuse_unknown(model, {"domains_T"}, "other data than the run's own")
    windows, probe = _windows(dataset, config.eval.windows), None
    if config.log.routing and model.routers and len(windows[0]):
        probe = RoutingProbe(model, domains=dataset.measured, windows=windows[0],
                             seq_len=config.train.seq_len, vocab_size=dataset.vocab_size, device=mesh.device)
    sums = _sums(model, dataset, mesh, config, told, stop, windows, probe)
    if sums is None:
        return None
    results: dict[str, float] = {}
    for domain, (nats, tokens, text_bytes, unknown) in zip(dataset.measured, sums[:, :_FIGURES].tolist()):
        name = "mean (domain)" if domain == "mean" else domain  # `mean` itself is the mean over domains
        if tokens:
            results[f"loss/{name}"] = nats / tokens
            if not unknown:
                results[f"nats_per_byte/{name}"] = nats / max(1.0, text_bytes)
    for kind in ("loss", "nats_per_byte"):
        values = [value for name, value in results.items() if name.startswith(f"{kind}/")]
        if values or kind == "loss":
            results[f"{kind}/mean"] = sum(values) / max(1, len(values))
    return Evaluation(results, sums[:, _FIGURES:].long(),
                      None if probe is None else probe.summed(mesh["batch"], step))


def _sums(model: Transformer, dataset: Dataset, mesh: Mesh, config: Config,
          told: Callable[[Batch], RouterContext], stop: Callable[[], bool],
          windows: tuple[np.ndarray, np.ndarray], probe: RoutingProbe | None) -> Tensor | None:
    """Sums over all ranks: float64 [M, _FIGURES + L] on the host; None where a rank stops.

    Besides the agreement between ranks, the host waits for the device only once, at the end. Arguments as in
    `evaluate`; `told` builds what routers are told of a batch, `windows` is from `_windows`, and `probe` is
    added to.
    """
    group, size = mesh["batch"], config.eval.batch
    ids, parts = windows
    firsts = range(group.position * size, len(ids), group.size * size)
    mine = all_or_none(
        group, lambda: [(dataset.batch(ids[at:at + size]), parts[at:at + size]) for at in firsts])
    nothing = (padding(1, config.train.seq_len, mask_documents=config.data.mask_documents),
               np.zeros(1, np.int64))
    text = torch.zeros(len(dataset.measured), 2, dtype=torch.float64)
    choices = [router.num_choices for router in model.main_routers.values()]
    sums = torch.zeros(len(dataset.measured), 2 + sum(choices), dtype=torch.float64,
                       device=mesh.device)
    model.eval()
    for number in range(-(-len(ids) // (group.size * size))):
        if largest_over(group, stop()):  # the reduction costs little beside a forward pass
            model.train()
            return None
        batch, parts_B = mine[number] if number < len(mine) else nothing
        for part, rows in _stretches(parts_B):  # bytes are counted while the batch is on the host
            known = dataset.bytes_of_targets(
                Batch(*(field if field is None else field[rows] for field in batch)))
            text[part] += torch.tensor([known or 0, known is None])
        batch = batch.to(mesh.device)
        output = _output(model, batch, told(batch), parts_B,
                         (number * group.size + group.position) * size, probe)
        for part, rows in _stretches(parts_B):
            assert output.logits_BSV is not None and batch.scored_BS is not None
            nats = cross_entropy_sum(output.logits_BSV[rows], batch.targets_BS[rows]).double()
            head = torch.stack([nats, batch.scored_BS[rows].sum().double()])
            sums[part] += torch.cat(
                [head, *(stats.counts_SE[rows].sum(0).double() for stats in output.stats.values())])
    model.train()
    return sum_over(group, torch.cat([sums[:, :2], to_device(text, mesh.device), sums[:, 2:]], 1)).cpu()


def _output(model: Transformer, batch: Batch, context: RouterContext, parts_B: np.ndarray, first: int,
            probe: RoutingProbe | None) -> ModelOutput:
    """Run the model on a batch. `first` is the number of its first window; the probe sees its routing."""
    def forward(tokens_BS: Tensor, context: RouterContext) -> ModelOutput:
        return model(tokens_BS, context, batch.documents_BS)

    if probe is None:
        return forward(batch.tokens_BS, context)
    return probe.run(forward, batch, context, parts_B, first)


def _windows(dataset: Dataset, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample id and index in Dataset.measured of every window, part by part."""
    ids = [dataset.heldout_ids(part, most) for part in range(len(dataset.measured))]
    return np.concatenate(ids), np.repeat(np.arange(len(ids)), [len(part) for part in ids])


def _stretches(parts_B: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield each part of a batch with its rows, which are adjacent."""
    borders = [0, *(np.flatnonzero(np.diff(parts_B)) + 1).tolist(), len(parts_B)]
    for first, end in pairwise(borders):
        yield int(parts_B[first]), slice(first, end)
