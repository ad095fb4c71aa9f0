"""Replanning under `parallel=fssdp`: choose homes and copies of experts for the next step from past loads.

    observe    after the update: add the pooled counts of the step to the forecast (plan/loads/forecast.py)
               and plan every bank of experts. At intervals also choose homes, if the planner moves them, and
               the experts to slice (rehoming.py)
    agreed     before the next step posts anything: check that all ranks have the same plan
    calibrate  within the step, when a router has chosen from the bank for the first time: add copies if that
               pays (plan/calibration.py)

Plans are made bank by bank. What a router has counted is added to the loads of the bank that it feeds;
choices that are no experts are none of its loads.

Pooled counts are the same integers on every rank, and planners are pure functions of integers, so ranks plan
alike without communication. A digest of the placement checks that. It is gathered while nothing waits for it.

The forecast's inputs and the homes are part of the state of a run. With others, other copies would follow,
and sums would be grouped differently. A sliced expert has a home, too: the position that always computes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Mesh
from moetrain.errors import PeerError
from moetrain.moe.experts import RoutedExperts
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
    """Inputs of planners besides loads.

    Attributes:
        topology: positions and nodes.
        costs: what a row, an expert and a link cost, by bank name.
        max_copies: copies that a position may hold of a bank.
    """

    topology: Topology
    costs: Mapping[str, Costs]
    max_copies: int

    def of(self, name: str) -> tuple[Topology, Costs, int]:
        """The inputs for one bank, by its name."""
        return self.topology, self.costs[name], self.max_copies


class ReplanIntervals(NamedTuple):
    """How often homes are chosen anew, and how many experts may be sliced then.

    Attributes:
        rehome: steps between choices of homes; 0 never changes them.
        sliced: experts of a bank that may be sliced; 0 slices none.
    """

    rehome: int
    sliced: int = 0


class Replanner:
    """Planning of all banks of experts from step to step.

    Args:
        banks: routed experts by bank name, in run order.
        feeds: names of the routers that choose from each bank.
        optimizer: optimizer whose state moves with homes.
        mesh: mesh of the run.
        copies: copies of all banks, which follow the plans.
        placement: placement in force at first, without copies.
        planner: chooses copies, and homes if it supports that.
        planning_inputs: inputs of the planner besides loads.
        forecaster: forecast of the loads of the same banks.
        intervals: how often homes are chosen anew.
        calibration: adds copies to a plan after the gate (plan/calibration.py); None adds none.
    """

    def __init__(self, banks: Mapping[str, RoutedExperts], feeds: Mapping[str, Sequence[str]],
                 optimizer: torch.optim.Optimizer, mesh: Mesh, copies: CopyManager,
                 placement: ExpertPlacement, planner: Planner, planning_inputs: PlanningInputs,
                 forecaster: LoadForecaster, intervals: ReplanIntervals,
                 calibration: Callable[..., LayerPlan | None] | None) -> None:
        self.banks, self.feeds, self.optimizer, self.mesh, self.copies, self.planner = (
            banks, feeds, optimizer, mesh, copies, planner)
        self.planning_inputs, self.forecaster, self.intervals = planning_inputs, forecaster, intervals
        self.placement, self.calibration = placement, calibration
        self.homes, self.sliced = self._flat_homes(), self._flat_sliced()
        self.positions = torch.zeros(1, dtype=torch.int64)   # number that `homes` refers to; 0 before a plan
        self._check: tuple[list[Tensor], dist.Work] | None = None
        with DeviceTables(mesh.device) as tables:
            for name, homes in placement.layers:
                self._dispatch_by(name, LayerPlan(homes, (0,) * homes.num_experts), tables)
            copies.set_placement(placement, tables)

    def observe(self, step: int, counts: Mapping[str, Tensor]) -> None:
        """Add a step to the forecast and plan the next one. Waits in the steps that choose homes.

        Args:
            step: number of the step that is complete.
            counts: int64 [C] by router, pooled over all ranks, on the host.
        """
        loads = [torch.stack([counts[router][:homes.num_experts] for router in self.feeds[name]]).sum(0)
                 for name, homes in self.placement.layers]
        self.forecaster.observe(torch.cat(loads) // self.mesh["expert_grad"].size)
        if self.intervals.rehome and step % self.intervals.rehome == 0:
            self._rehome()
        self._plan()

    def agreed(self) -> ExpertPlacement:
        """Return the placement in force, after a check that all ranks have planned the same. Waits.

        Raises:
            PeerError: the placements differ; raised on all ranks.
        """
        if self._check is None:
            return self.placement
        (digests, work), self._check = self._check, None
        work.wait()
        theirs = torch.cat(digests).tolist()
        if len(set(theirs)) > 1:
            usual = max(sorted(set(theirs)), key=theirs.count)
            raise PeerError(2, "the ranks have planned different copies:"
                               f" rank {self._odd(theirs, usual)} differs",
                            where="the placement of experts for the next step",
                            why="plans follow from counts that all ranks share, so memory or a link has"
                                " failed somewhere",
                            next="the same command resumes from the last checkpoint; if it happens again,"
                                 " check that machine")
        return self.placement

    def state_shards(self) -> Iterator[StateShard]:
        """Iterate over the state that a checkpoint keeps: tables of the forecast, homes, sliced experts."""
        sliced = {"sliced": self.sliced} if self.intervals.sliced else {}
        for name, table in {**self.forecaster.tables(), "homes": self.homes, "positions": self.positions,
                            **sliced}.items():
            yield StateShard(f"plan.{name}", tuple(table.shape), 0, table, "batch")

    def restored(self) -> None:
        """Take up the state read from a checkpoint: move experts to the homes that it names, and plan. Waits.

        Every rank calls it, after `state_shards` and the experts, each at its present home, have been read.
        Homes for another number of positions are ignored: the experts stay where they are.
        """
        positions, sizes = self.mesh["ep"].size, [layer.num_experts for _, layer in self.placement.layers]
        # Checkpoints of older releases do not have the number of positions.
        spread = int(self.positions) or int(self.homes.max()) + 1
        if spread == positions and self.homes.min() >= 0 and self.homes.max() < positions:
            self._move(ExpertPlacement(tuple(
                (name, LayerPlacement(tuple(homes.tolist()), positions,
                                      sliced=tuple(sliced.nonzero().flatten().tolist())))
                for name, homes, sliced
                in zip(self.banks, self.homes.split(sizes), self.sliced.split(sizes)))))
        self.homes, self.sliced = self._flat_homes(), self._flat_sliced()
        self._plan()

    def _rehome(self) -> None:
        """Choose homes, if the planner does that, and the experts to slice; move experts there. Waits."""
        if not isinstance(self.planner, SupportsRehoming) and not self.intervals.sliced:
            return
        topology, costs, _ = self.planning_inputs
        loads, homes = self.forecaster.loads(), self.placement.homes.whole
        if isinstance(self.planner, SupportsRehoming):
            homes = self.planner.rehome(loads, homes, topology, costs)
        self._move(ExpertPlacement(tuple((name, layer.with_sliced(self._sliced_of(name, loads[name], layer)))
                                         for name, layer in homes.layers)))

    def _sliced_of(self, name: str, loads_E: np.ndarray, homes: LayerPlacement) -> tuple[int, ...]:
        """Choose the experts of a bank to slice: by the planner if it supports that, else the hottest.

        Args:
            name: name of the bank.
            loads_E: int64 [E], rows expected of each expert.
            homes: homes of its experts.
        """
        if not self.intervals.sliced or not isinstance(self.planner, SupportsSlicing):
            return tuple(hottest_first(loads_E)[:self.intervals.sliced].tolist())
        homes = homes.with_sliced(self.placement[name].sliced)
        return self.planner.choose_sliced(loads_E, homes, *self.planning_inputs.of(name),
                                          self.intervals.sliced)

    def _move(self, placement: ExpertPlacement) -> None:
        """Drop all copies and move every expert to its home in a placement. Waits."""
        banks = {name: experts.bank for name, experts in self.banks.items()}
        self.copies.release()
        reshard(banks, self.optimizer, self.placement, placement, self.mesh["ep"])
        self.placement = placement
        self.homes, self.sliced = self._flat_homes(), self._flat_sliced()

    def _flat_homes(self) -> Tensor:
        """List the homes of the experts of all banks, int64."""
        return torch.tensor([home for _, layer in self.placement.layers for home in layer.home],
                            dtype=torch.int64)

    def _flat_sliced(self) -> Tensor:
        """Mark the sliced experts of all banks with 1, the others with 0, int64."""
        return torch.tensor([expert in layer.sliced for _, layer in self.placement.layers
                             for expert in range(layer.num_experts)], dtype=torch.int64)

    def _plan(self) -> None:
        """Plan the copies of all banks, put the placement in force, and start the check between ranks."""
        self.positions.fill_(self.mesh["ep"].size)
        loads, homes, layers = self.forecaster.loads(), self.placement.homes, []
        with DeviceTables(self.mesh.device) as tables:
            for name in self.banks:
                plan = self.planner.plan(loads[name], homes[name], *self.planning_inputs.of(name))
                plan = replace(plan, placement=plan.placement.with_sliced(homes[name].sliced))
                self._dispatch_by(name, plan, tables)
                layers.append((name, plan.placement))
            self.placement = ExpertPlacement(tuple(layers))
            self.copies.set_placement(self.placement, tables)
        self._compare()

    def _dispatch_by(self, name: str, plan: LayerPlan, tables: DeviceTables) -> None:
        """Make the dispatcher of a bank follow a plan."""
        topology, costs, _ = self.planning_inputs.of(name)
        calibrate = self.calibration and partial(self._calibrate, name, plan)
        self.banks[name].dispatcher.set_placement(
            plan.placement, tables, rule_of(self.planner.rule, plan, topology, costs), calibrate)

    def _calibrate(self, name: str, plan: LayerPlan, n_PE: Tensor) -> None:
        """Add copies to the plan of a bank if that pays, by the counts of its first pass in a step.

        These counts stand for those of later passes and micro-batches. All positions have the same counts and
        decide alike. Recomputation and forward passes outside of a step find `calibrated` set and add
        nothing.

        Args:
            name: name of the bank.
            plan: its plan for this step.
            n_PE: int64 [P, E], rows of the pass from every position for every expert, on the host.
        """
        copies = self.copies.banks[name]
        if copies.calibrated:
            return
        copies.calibrated = True
        assert self.calibration is not None
        more = self.calibration(n_PE * copies.backwards, plan, self.planner,
                                *self.planning_inputs.of(name))
        if more is not None:
            copies.add_copies(more.placement)
            with DeviceTables(self.mesh.device) as tables:
                self._dispatch_by(name, more, tables)

    def _compare(self) -> None:
        """Start to gather the placement digests of all ranks; `agreed` waits for them."""
        group = self.mesh["batch"]
        if group.process_group is None:
            return
        self.agreed()
        mine = to_device(torch.tensor([self.placement.digest], dtype=torch.int64), self.mesh.device)
        digests = [torch.empty_like(mine) for _ in group.ranks]
        self._check = digests, dist.all_gather(digests, mine, group=group.process_group, async_op=True)

    def _odd(self, theirs: list[int], usual: int) -> str:
        """List the ranks whose digest is not the usual one."""
        ranks = self.mesh["batch"].ranks
        return ", ".join(str(rank) for rank, digest in zip(ranks, theirs) if digest != usual)
