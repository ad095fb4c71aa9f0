"""temporary"""
from typing import NamedTuple, Protocol
from moetrain.plan.placement import LayerPlacement
from moetrain.plan.rules import LocalFirst


class LayerPlan(NamedTuple):
    placement: LayerPlacement

    def rule(self, topology, costs):
        return LocalFirst(topology)


class Planner(Protocol):
    def plan(self, loads, homes, topology, costs, room) -> LayerPlan: ...


class Nothing:
    def __init__(self) -> None: ...

    def plan(self, loads, homes, topology, costs, room):
        return LayerPlan(homes)

    def rehome(self, loads, placement, topology, costs):
        return placement
