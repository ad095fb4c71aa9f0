"""temporary"""
import torch
from torch import Tensor
from moetrain.plan.costs import Topology
from moetrain.plan.placement import LayerPlacement


class LocalFirst:
    looks_at_all = False

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def split(self, n_PE: Tensor, placement: LayerPlacement, first: int) -> Tensor:
        out = n_PE.new_zeros(len(n_PE), len(placement.replicas))
        table = {}
        for c, (e, p, _) in enumerate(placement.replicas):
            table.setdefault(e, []).append((c, p))
        for row, n_E in enumerate(n_PE.tolist()):
            source = first + row
            for e, n in enumerate(n_E):
                at = [c for c, p in table[e] if p == source] or [c for c, p in table[e] if self.topology.node_of(p) == self.topology.node_of(source)] or [c for c, p in table[e]]
                for i in range(len(at)):
                    out[row, at[(i + source) % len(at)]] = n // len(at) + (i < n % len(at))
        return out


class Everywhere(LocalFirst):
    looks_at_all = True
