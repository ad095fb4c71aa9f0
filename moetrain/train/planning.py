"""Which experts are copied where in the next step: loads of the last steps in, a placement in force out (parallel=fssdp).

    observe    after the update: the pooled counts of the step join the history; forecast; a plan for every layer
    agreed     before the next step posts anything: all ranks have the same plan, or none goes on

Counts are pooled, so they are the same integers on every rank, and planners are pure functions of integers: ranks plan alike
without talking. That they did is checked by a digest, gathered while nothing waits for it.

The history is part of the state of a run: from other forecasts would follow other copies, and from these sums that are
grouped otherwise.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.mesh import Mesh
from moetrain.errors import PeerError
from moetrain.model.transformer import Transformer
from moetrain.parallel.fssdp import CopyManager
from moetrain.parallel.pieces import Piece
from moetrain.plan.costs import Costs, Topology
from moetrain.plan.placement import ExpertPlacement
from moetrain.plan.planners.base import Planner


class Surroundings(NamedTuple):
    """What planners are told besides loads; costs by router name. room: copies a position may hold in a layer."""

    topology: Topology
    costs: Mapping[str, Costs]
    room: int


class Planning:
    """placement: the one in force, without copies at first. window: steps whose mean is the forecast."""

    def __init__(self, model: Transformer, mesh: Mesh, copies: CopyManager, placement: ExpertPlacement, planner: Planner,
                 surroundings: Surroundings, window: int) -> None:
        self.model, self.mesh, self.copies, self.planner = model, mesh, copies, planner
        self.surroundings = surroundings
        self.placement = placement
        self.history = torch.zeros(window, sum(model.routers.values()), dtype=torch.int64)      # newest last; zeros: none
        self._check: tuple[Tensor, dist.Work] | None = None

    def observe(self, counts: Mapping[str, Tensor]) -> None:
        """The step's pooled counts by router: plan the next step."""
        newest = torch.cat([counts[name].cpu() for name in self.model.routers]) // self.mesh["expert_grad"].size
        self.history = torch.cat([self.history[1:], newest[None]])
        self._plan()

    def agreed(self) -> None:
        """Wait for what the others have planned; PeerError on all ranks where it differs."""
        if self._check is None:
            return
        (digests, work), self._check = self._check, None
        work.wait()
        theirs = digests.tolist()
        if len(set(theirs)) > 1:
            usual = max(sorted(set(theirs)), key=theirs.count)
            raise PeerError(2, f"the ranks have planned different copies: rank {self._odd(theirs, usual)} differs",
                            where="the placement of experts for the next step",
                            why="plans follow from counts that all ranks share, so memory or a link has failed somewhere",
                            next="the same command resumes from the last checkpoint; if it happens again, check that machine")

    def pieces(self) -> Iterator[Piece]:
        yield Piece("plan.loads", tuple(self.history.shape), 0, self.history, "batch")

    def restored(self) -> None:
        """The history has been read: plan from it."""
        self._plan()

    def _plan(self) -> None:
        sizes, known = self.model.routers, self.history.any(1).sum()
        loads = dict(zip(sizes, (self.history.sum(0) // known.clamp(min=1)).split(list(sizes.values()))))
        topology, costs, room = self.surroundings
        plans = {name: self.planner.plan(loads[name].numpy(), homes.without_copies(), topology, costs[name], room)
                 for name, homes in self.placement.layers}
        self.placement = ExpertPlacement(tuple((name, plan.placement) for name, plan in plans.items()))
        self.copies.adopt(self.placement)
        for block in self.model.layers:
            if block.moe is not None:
                plan = plans[block.moe.name]
                block.moe.dispatcher.adopt(plan.placement, plan.rule(topology, costs[block.moe.name]))
        self._compare()

    def _compare(self) -> None:
        group = self.mesh["batch"]
        if group.process_group is None:
            return
        self.agreed()
        mine = torch.tensor([self.placement.digest], dtype=torch.int64, device=self.mesh.device)
        digests = mine.new_empty(group.size)
        self._check = digests, dist.all_gather_into_tensor(digests, mine, group=group.process_group, async_op=True)

    def _odd(self, theirs: list[int], usual: int) -> str:
        ranks = self.mesh["batch"].ranks
        return ", ".join(str(rank) for rank, digest in zip(ranks, theirs) if digest != usual)
