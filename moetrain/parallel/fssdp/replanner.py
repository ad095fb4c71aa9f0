"""Which experts are copied where in the next step: loads of the last steps in, a placement in force out (parallel=fssdp).

    observe    after the update: the pooled counts of the step join what is known; forecast (plan/loads/forecast.py); a plan for
               every layer; every so many steps also homes, if the planner moves them or some are to be cut up
               (parallel/fssdp/rehoming.py)
    agreed     before the next step posts anything: all ranks have the same plan, or none goes on
    calibrate  in the step, once a layer has routed its first micro-batch: more copies, where that pays (plan/calibration.py)

Counts are pooled, so they are the same integers on every rank, and planners are pure functions of integers: ranks plan alike
without talking. That they did is checked by a digest, gathered while nothing waits for it.

What forecasts are made of and the homes are part of the state of a run: from others would follow other copies, and from
these sums that are grouped otherwise. An expert in pieces has a home, too: that one always computes it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Mesh
from moetrain.errors import PeerError
from moetrain.moe.layer import MoELayer
from moetrain.ops.pinned import DeviceTables, to_device
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.parallel.fssdp.rehoming import reshard
from moetrain.parallel.state_shards import StateShard
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.loads.forecast import LoadForecaster
from moetrain.plan.placement import ExpertPlacement, LayerPlacement
from moetrain.plan.planners.base import LayerPlan, Planner, SupportsRehoming, SupportsSlicing, hottest_first
from moetrain.plan.splitting.rules import rule_of


class PlanningInputs(NamedTuple):
    """What planners are told besides loads. Experts of all layers are of one size. room: copies a position may hold in a
    layer."""

    topology: Topology
    costs: Costs
    room: int


class ReplanIntervals(NamedTuple):
    """rehome: steps between looks at the homes; 0 leaves them. sliced: experts of a layer, of the hottest of the forecast,
    whose homes may then be cut up."""

    rehome: int
    sliced: int = 0


class Replanner:
    """layers: by the name of their router, in the order of the model. placement: the one in force, without copies at first.
    forecaster: for the same routers. calibration: what decides on more copies after the gate; None: nothing does."""

    def __init__(self, layers: Mapping[str, MoELayer], optimizer: torch.optim.Optimizer, mesh: Mesh, copies: CopyManager,
                 placement: ExpertPlacement, planner: Planner, planning_inputs: PlanningInputs, forecaster: LoadForecaster,
                 intervals: ReplanIntervals, calibration: Callable[..., LayerPlan | None] | None) -> None:
        self.layers, self.optimizer, self.mesh, self.copies, self.planner = layers, optimizer, mesh, copies, planner
        self.planning_inputs, self.forecaster, self.intervals = planning_inputs, forecaster, intervals
        self.placement, self.calibration = placement, calibration
        self.homes, self.sliced = self._flat_homes(), self._flat_sliced()
        self.positions = torch.zeros(1, dtype=torch.int64)       # that the homes are spread over; 0 before there is a plan
        self._check: tuple[list[Tensor], dist.Work] | None = None
        with DeviceTables(mesh.device) as tables:
            for name, moe in layers.items():
                homes = placement[name]
                self._dispatch_by(moe, LayerPlan(homes, (0,) * homes.num_experts), tables)
            copies.set_placement(placement, tables)

    def observe(self, step: int, counts: Mapping[str, Tensor]) -> None:
        """The pooled counts of a step by router, on the host: plan the next."""
        newest = torch.cat([counts[name] for name in self.layers]) // self.mesh["expert_grad"].size
        self.forecaster.observe(newest)
        if self.intervals.rehome and step % self.intervals.rehome == 0:
            self._rehome()
        self._plan()

    def agreed(self) -> ExpertPlacement:
        """The placement in force, once the others have planned it too. Waits; PeerError on all ranks where it differs."""
        if self._check is None:
            return self.placement
        (digests, work), self._check = self._check, None
        work.wait()
        theirs = torch.cat(digests).tolist()
        if len(set(theirs)) > 1:
            usual = max(sorted(set(theirs)), key=theirs.count)
            raise PeerError(2, f"the ranks have planned different copies: rank {self._odd(theirs, usual)} differs",
                            where="the placement of experts for the next step",
                            why="plans follow from counts that all ranks share, so memory or a link has failed somewhere",
                            next="the same command resumes from the last checkpoint; if it happens again, check that machine")
        return self.placement

    def state_shards(self) -> Iterator[StateShard]:
        sliced = {"sliced": self.sliced} if self.intervals.sliced else {}
        for name, table in {**self.forecaster.tables(), "homes": self.homes, "positions": self.positions, **sliced}.items():
            yield StateShard(f"plan.{name}", tuple(table.shape), 0, table, "batch")

    def restored(self) -> None:
        """Forecast and homes have been read, and the experts into the homes as they were: move them, and plan. Collective.

        Homes of another number of positions are left alone: the experts stay as they are spread at the start, over all of these.
        """
        positions, sizes = self.mesh["ep"].size, [self.placement[name].num_experts for name in self.layers]
        spread = int(self.positions) or int(self.homes.max()) + 1        # checkpoints of older releases do not say
        if spread == positions and self.homes.min() >= 0 and self.homes.max() < positions:
            self._move(ExpertPlacement(tuple(
                (name, LayerPlacement(tuple(homes.tolist()), positions, sliced=tuple(sliced.nonzero().flatten().tolist())))
                for name, homes, sliced in zip(self.layers, self.homes.split(sizes), self.sliced.split(sizes)))))
        self.homes, self.sliced = self._flat_homes(), self._flat_sliced()
        self._plan()

    def _rehome(self) -> None:
        """Other homes, if the planner has any; and experts in pieces. Waits."""
        if not isinstance(self.planner, SupportsRehoming) and not self.intervals.sliced:
            return
        topology, costs, _ = self.planning_inputs
        loads, homes = self.forecaster.loads(), self.placement.homes.whole
        if isinstance(self.planner, SupportsRehoming):
            homes = self.planner.rehome(loads, homes, topology, costs)
        self._move(ExpertPlacement(tuple((name, layer.with_sliced(self._sliced_of(name, loads[name], layer)))
                                         for name, layer in homes.layers)))

    def _sliced_of(self, name: str, loads_E: np.ndarray, homes: LayerPlacement) -> tuple[int, ...]:
        """Experts of a layer to be cut up: as the planner decides, or the hottest."""
        if not self.intervals.sliced or not isinstance(self.planner, SupportsSlicing):
            return tuple(hottest_first(loads_E)[:self.intervals.sliced].tolist())
        homes = homes.with_sliced(self.placement[name].sliced)
        return self.planner.choose_sliced(loads_E, homes, *self.planning_inputs, self.intervals.sliced)

    def _move(self, placement: ExpertPlacement) -> None:
        """Every expert to its home in a placement. Waits."""
        banks = {name: moe.experts.bank for name, moe in self.layers.items()}
        self.copies.release()
        reshard(banks, self.optimizer, self.placement, placement, self.mesh["ep"])
        self.placement = placement
        self.homes, self.sliced = self._flat_homes(), self._flat_sliced()

    def _flat_homes(self) -> Tensor:
        return torch.tensor([home for _, layer in self.placement.layers for home in layer.home], dtype=torch.int64)

    def _flat_sliced(self) -> Tensor:
        """1 for the experts that lie in pieces, 0 for the others."""
        return torch.tensor([expert in layer.sliced for _, layer in self.placement.layers
                             for expert in range(layer.num_experts)], dtype=torch.int64)

    def _plan(self) -> None:
        self.positions.fill_(self.mesh["ep"].size)
        topology, costs, room = self.planning_inputs
        loads, homes, layers = self.forecaster.loads(), self.placement.homes, []
        with DeviceTables(self.mesh.device) as tables:
            for name, moe in self.layers.items():
                plan = self.planner.plan(loads[name], homes[name], topology, costs, room)
                plan = replace(plan, placement=plan.placement.with_sliced(homes[name].sliced))
                self._dispatch_by(moe, plan, tables)
                layers.append((name, plan.placement))
            self.placement = ExpertPlacement(tuple(layers))
            self.copies.set_placement(self.placement, tables)
        self._compare()

    def _dispatch_by(self, moe: MoELayer, plan: LayerPlan, tables: DeviceTables) -> None:
        topology, costs, _ = self.planning_inputs
        calibrate = self.calibration and partial(self._calibrate, moe, plan)
        moe.experts.dispatcher.set_placement(plan.placement, tables, rule_of(self.planner.rule, plan, topology, costs), calibrate)

    def _calibrate(self, moe: MoELayer, plan: LayerPlan, n_PE: Tensor) -> None:
        """With the counts of a layer's first micro-batch in a step; they stand for those of the others. The same at all
        positions, and never for what a step runs again, nor outside of one."""
        copies = self.copies.layers[moe.name]
        if copies.calibrated:
            return
        copies.calibrated = True
        more = self.calibration(n_PE * copies.backwards, plan, self.planner, *self.planning_inputs)
        if more is not None:
            copies.add_copies(more.placement)
            with DeviceTables(self.mesh.device) as tables:
                self._dispatch_by(moe, more, tables)

    def _compare(self) -> None:
        group = self.mesh["batch"]
        if group.process_group is None:
            return
        self.agreed()
        mine = to_device(torch.tensor([self.placement.digest], dtype=torch.int64), self.mesh.device)
        digests = [torch.empty_like(mine) for _ in group.ranks]
        self._check = digests, dist.all_gather(digests, mine, group=group.process_group, async_op=True)

    def _odd(self, theirs: list[int], usual: int) -> str:
        ranks = self.mesh["batch"].ranks
        return ", ".join(str(rank) for rank, digest in zip(ranks, theirs) if digest != usual)
