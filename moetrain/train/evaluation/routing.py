"""Routing of an evaluation, for `log.routing`: what the experts are chosen for.

The layers call `on_routing` in every forward pass. What they tell is added to tables on the device, which are
summed over ranks once, at the end. Each held-out window also runs with its tokens in a random order: the same
words without their context, a shifted input on which entropy and drops are measured too. An evaluation then
takes twice the time.

At most ROUTERS routers are followed, evenly spaced over the layers. Token ids from MOST_IDS - 1 on are
counted as one. Choices that are no experts count as none.

Shapes: R routers, E experts of the largest, T tokens, K slots, D model width, B windows, S positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over
from moetrain.data.batches.batch import Batch
from moetrain.model.transformer import ModelOutput, Transformer
from moetrain.ops.counts import count_ids
from moetrain.ops.gating import scatter_weights
from moetrain.ops.keyed_random import bits
from moetrain.ops.pinned import to_device
from moetrain.routers.base import RouterContext, Routing
from moetrain.runs.routing_record import DECILES, RoutingRecord

ROUTERS = 8            # routers that are followed
MOST_IDS = 4096        # rows of the tables by token id
STRETCHES = 64         # of a sequence, in the table of positions
PROBE = 4096           # tokens of the probe, about
INPUTS = ("held_out", "shifted")


class _Pass(NamedTuple):
    """What the tokens of a forward pass are, by token."""

    number: int                # of the input, in INPUTS
    valid_T: Tensor
    ids_T: Tensor              # token ids, below MOST_IDS
    previous_T: Tensor         # of the token before; -1 where there is none
    stretches_T: Tensor
    deciles_T: Tensor
    domains_T: Tensor          # part of Dataset.measured
    probe_T: Tensor            # place in the probe; -1 outside it


class RoutingProbe:
    """Collector of an evaluation's routing on this rank.

    Args:
        model: the model.
        domains: names of the measured parts.
        windows: sample ids of all windows of the evaluation, in its order.
        seq_len: S.
        vocab_size: number of token ids.
        device: device of the tables.
    """

    def __init__(self, model: Transformer, *, domains: tuple[str, ...], windows: np.ndarray, seq_len: int,
                 vocab_size: int, device: torch.device) -> None:
        every = {name: router.num_experts for name, router in model.main_routers.items()}
        names = list(every)
        followed = np.unique(np.linspace(0, len(names) - 1, min(ROUTERS, len(names))).round().astype(int))
        self.routers = {names[index]: place for place, index in enumerate(followed)}
        self.experts = [every[name] for name in self.routers]
        self.domains, self.device = domains, device
        self.num_ids, self.stretches = min(vocab_size, MOST_IDS), min(seq_len, STRETCHES)
        self.probed = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), max(1, PROBE // seq_len)))
                                .round().astype(int))
        self.probe_ids = windows[self.probed]
        routers, experts, tokens = len(self.routers), max(self.experts), len(self.probed) * seq_len
        by_input, rows = (len(INPUTS), routers), {
            "ids": self.num_ids, "previous": self.num_ids, "positions": self.stretches,
            "by_domain": len(domains)}
        shapes = {"tokens": (len(INPUTS),), **{name: (routers, many, experts) for name, many in rows.items()},
                  "pairs": (routers, routers, experts, experts), "chosen": (*by_input, DECILES),
                  "dropped": (*by_input, DECILES), "unrouted": by_input, "first": (routers, tokens)}
        self.counts = {name: torch.zeros(shape, dtype=torch.int64, device=device)
                       for name, shape in shapes.items()}
        self.active = torch.zeros(routers, tokens, experts, dtype=torch.uint8, device=device)
        self.entropy = torch.zeros(by_input, dtype=torch.float64, device=device)
        self.inputs: dict[str, Tensor] = {}    # by router, float64 [E + 1, D + 2]: see `spread`
        self._first: dict[str, Tensor] = {}    # first choices of the pass under way, by router
        self._pass: _Pass | None = None

    def run(self, forward: Callable[[Tensor, RouterContext], ModelOutput], batch: Batch,
            context: RouterContext, parts_B: np.ndarray, first: int) -> ModelOutput:
        """Run a batch forward, and then its shifted input.

        Args:
            forward: runs the model on tokens [B, S].
            batch: the windows, on the device.
            context: what routers are told of them.
            parts_B: part of Dataset.measured of each window.
            first: number of the first window in the evaluation's order; beyond its end for padding.

        Returns:
            The output for the batch as it stands.
        """
        outputs = []
        for number, tokens_BS in enumerate((batch.tokens_BS, shuffled(batch, context))):
            self._pass = self._of(number, tokens_BS, batch, parts_B, first)
            self.counts["tokens"][number] += batch.valid_BS.sum()
            outputs.append(forward(
                tokens_BS, context._replace(token_ids_T=tokens_BS.flatten(), on_routing=self.add)))
        self._first.clear()
        return outputs[0]

    def add(self, router: str, x_TD: Tensor, chosen: Routing, kept: Routing) -> None:
        """Add a decision.

        Args:
            router: name of the router.
            x_TD: its input.
            chosen: the decision.
            kept: what capacity left of it.
        """
        if router not in self.routers:
            return
        row, now = self.routers[router], self._pass
        assert now is not None, "decisions come inside `run`"
        ids_TK = chosen.ids_TK
        used_T = (ids_TK >= 0).sum(1)
        kept_T = (kept.ids_TK >= 0).sum(1)
        for name, amounts_T in (("chosen", used_T), ("dropped", used_T - kept_T)):
            self.counts[name][now.number, row].index_add_(0, now.deciles_T, amounts_T)
        self.counts["unrouted"][now.number, row] += ((kept_T == 0) & now.valid_T).sum()
        self.entropy[now.number, row] += chosen.stats.entropy_sum.double()
        if now.number:
            return
        for name, keys_T in (("ids", now.ids_T), ("previous", now.previous_T),
                             ("positions", now.stretches_T), ("by_domain", now.domains_T)):
            table_XE = self.counts[name][row]
            cells_TK = keys_T[:, None] * table_XE.shape[1] + ids_TK
            cells_TK = cells_TK.where((ids_TK >= 0) & (keys_T >= 0)[:, None], -1)
            table_XE += count_ids(cells_TK, table_XE.numel()).view_as(table_XE)
        first_T = ids_TK[:, 0]
        self._add_pairs(router, first_T)
        self._add_input(router, x_TD.double().where(now.valid_T[:, None], 0), first_T, now.valid_T)
        self._add_probe(row, ids_TK, now.probe_T)

    def _add_input(self, router: str, x_TD: Tensor, first_T: Tensor, valid_T: Tensor) -> None:
        """Add up inputs, their squares and their number by first choice; the last row is of none."""
        experts = self.experts[self.routers[router]]
        rows_TX = torch.cat([x_TD, x_TD.square().sum(1, keepdim=True), valid_T[:, None].double()], 1)
        if router not in self.inputs:
            self.inputs[router] = rows_TX.new_zeros(experts + 1, rows_TX.shape[1])
        self.inputs[router].index_add_(0, first_T.where(first_T >= 0, experts), rows_TX)

    def _add_probe(self, row: int, ids_TK: Tensor, probe_T: Tensor) -> None:
        """Note the choices of the probe's tokens."""
        there_TE = scatter_weights((ids_TK >= 0).to(torch.float32), ids_TK, self.active.shape[2])
        places_T = probe_T.clamp(min=0)
        inside_T = probe_T >= 0
        self.active[row].index_add_(0, places_T, (there_TE > 0).to(torch.uint8) * inside_T[:, None])
        # Counted from 1, so that ranks without the token add nothing.
        self.counts["first"][row].index_add_(0, places_T, (ids_TK[:, 0] + 1) * inside_T)

    def _add_pairs(self, router: str, first_T: Tensor) -> None:
        """Count a router's first choices together with those of each router before it in the pass."""
        for earlier, earlier_T in self._first.items():
            table_EE = self.counts["pairs"][self.routers[earlier], self.routers[router]]
            cells_T = (earlier_T * len(table_EE) + first_T).where((earlier_T >= 0) & (first_T >= 0), -1)
            table_EE += count_ids(cells_T, table_EE.numel()).view_as(table_EE)
        self._first[router] = first_T

    def _of(self, number: int, tokens_BS: Tensor, batch: Batch, parts_B: np.ndarray, first: int) -> _Pass:
        length, valid_BS = tokens_BS.shape[1], batch.valid_BS
        ids_BS = tokens_BS.clamp(max=self.num_ids - 1)
        previous_BS = torch.cat([torch.full_like(ids_BS[:, :1], -1), ids_BS[:, :-1]], 1)
        positions_BS = torch.arange(length, device=self.device).expand_as(tokens_BS)
        numbers_B = first + np.arange(len(parts_B))
        places_B = np.searchsorted(self.probed, numbers_B).clip(max=len(self.probed) - 1)
        places_B = np.where(self.probed[places_B] == numbers_B, places_B * length, -1)
        starts_B, domains_B = (to_device(torch.from_numpy(each), self.device) for each in (places_B, parts_B))
        probe_BS = (starts_B[:, None] + positions_BS).where(valid_BS & (starts_B[:, None] >= 0), -1)
        fields = (valid_BS, ids_BS, previous_BS, positions_BS * self.stretches // length,
                  positions_BS * DECILES // length, domains_B[:, None].expand_as(tokens_BS), probe_BS)
        return _Pass(number, *(field.flatten() for field in fields))

    def summed(self, group: Group, step: int) -> RoutingRecord:
        """Sum over ranks, and make the record. Collective."""
        counts = _summed(group, list(self.counts.values()))
        entropy, *inputs = _summed(group, [self.entropy, *self.inputs.values()])
        arrays = dict(zip(self.counts, counts))
        active = sum_over(group, self.active).cpu().numpy()
        arrays["first"] = arrays["first"] - 1
        return RoutingRecord(
            step=np.array(step), routers=np.array(list(self.routers), dtype=np.str_),
            experts=np.array(self.experts, dtype=np.int64), inputs=np.array(INPUTS, dtype=np.str_),
            domains=np.array(self.domains, dtype=np.str_), entropy=entropy, probe=self.probe_ids,
            spread=np.array([spread(table) for table in inputs]), active=np.packbits(active > 0, axis=-1),
            **arrays)


def _summed(group: Group, tensors: list[Tensor]) -> list[np.ndarray]:
    """Sum tensors of one dtype over ranks, in one collective."""
    flat = sum_over(group, torch.cat([tensor.flatten() for tensor in tensors])).cpu()
    return [part.view(tensor.shape).numpy()
            for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors)]


def spread(sums: np.ndarray) -> tuple[float, float]:
    """Squared distances from the mean: of the means of groups, by their size, and of all members.

    Args:
        sums: float64 [groups, D + 2]: sums of the members' vectors, of their squares, and their number.
    """
    vectors, squares, sizes = sums[:, :-2], sums[:, -2], sums[:, -1]
    total = sizes.sum()
    center = (vectors.sum(0) ** 2).sum() / max(total, 1)
    between = ((vectors ** 2).sum(1) / np.maximum(sizes, 1)).sum() - center
    return max(0.0, float(between)), max(0.0, float(squares.sum() - center))


def shuffled(batch: Batch, context: RouterContext) -> Tensor:
    """The tokens of each sequence in a random order, keyed by the sequence: the same on every mesh."""
    key = context._replace(router="shifted input", step=0, draw=0, draws=1)
    order_BS = bits(key, 1).view_as(batch.tokens_BS)
    order_BS = order_BS.where(batch.valid_BS, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return batch.tokens_BS.gather(1, order_BS)
