"""Strategies of hypothesis for placements of experts and for the rows that are routed to them."""

import numpy as np
import torch
from hypothesis import settings, strategies as st
from torch import Tensor

from moetrain.plan.cost.machine import Topology
from moetrain.plan.placement import LayerPlacement

# The same examples in every run, and none kept from earlier runs.
FEW = settings(max_examples=25, derandomize=True, database=None, deadline=None)


@st.composite
def layers(draw: st.DrawFn, *, sliced: bool = False) -> tuple[LayerPlacement, Topology]:
    """Homes, no copies to copies everywhere, and nodes of any size; with `sliced` also sliced experts."""
    positions, experts = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    home = tuple(draw(st.lists(st.integers(0, positions - 1), min_size=experts, max_size=experts)))
    cells = draw(st.one_of(st.just(0), st.just(-1), st.integers(0, 2**(experts * positions) - 1)))
    copies = tuple((expert, at) for expert in range(experts) for at in range(positions)
                   if at != home[expert] and cells >> (expert * positions + at) & 1)
    cut = tuple(draw(st.sets(st.integers(0, experts - 1)))) if sliced else ()
    return LayerPlacement(home, positions, copies, cut), Topology(positions, draw(st.integers(1, positions)))


@st.composite
def routed_layers(draw: st.DrawFn) -> tuple[Tensor, LayerPlacement, Topology]:
    """A layer, and rows of each source for each expert, int64 [P, E]; some sources and experts have none."""
    placement, topology = draw(layers())
    size_P = draw(st.lists(st.sampled_from([0, 1, 30, 900]), min_size=placement.positions,
                           max_size=placement.positions))
    share_E = draw(st.lists(st.sampled_from([0, 1, 3, 17]), min_size=placement.num_experts,
                            max_size=placement.num_experts))
    odd = draw(st.integers(0, 2**16))               # so that rows seldom divide evenly
    n_PE = np.outer(size_P, share_E)
    n_PE += (n_PE > 0) * (np.arange(n_PE.size).reshape(n_PE.shape) * 7919 + odd) % 5
    return torch.from_numpy(n_PE), placement, topology
