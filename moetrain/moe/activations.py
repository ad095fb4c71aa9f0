"""Share of hidden activations of each expert that are zero: HoME's sign of a collapsed expert.

HoME (arXiv 2408.05430) counts activations of value 0 after ReLU: experts with nine of ten were useless. SiLU
is hardly ever 0, so an activation counts as zero if its size is at most `threshold`.

Counts are sums over tokens, so those of batches and ranks add up. Each rank counts its own tokens, wherever
the experts are.

Shapes: T tokens, D width of the experts' input, K slots, F expert width, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.moe.experts import RoutedExperts


class ZeroActivations(NamedTuple):
    """Numbers of activations of each expert."""

    zeros_E: Tensor          # int64, at most the threshold
    all_E: Tensor            # int64

    def shares(self) -> Tensor:
        """Share of zeros [E], float64; not a number for an expert without tokens."""
        return self.zeros_E.double() / self.all_E.double()


@torch.no_grad()
def zero_activations(experts: RoutedExperts, x_TD: Tensor, ids_TK: Tensor,
                     threshold: float = 0.0) -> ZeroActivations:
    """Run the first half of the experts, and count. Collective, and waits.

    Args:
        experts: the experts of a layer, of a form that defines `hidden`.
        x_TD: [T, D], what the experts are given.
        ids_TK: int64 [T, K], experts of each token; -1 is unused.
        threshold: largest size of an activation that counts as zero.
    """
    weights_TK = torch.ones(ids_TK.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32),
                            device=x_TD.device).where(ids_TK >= 0, 0)
    hidden_TKF = experts(x_TD, ids_TK, weights_TK, part="hidden", reduce=False).wait()
    used_TK = ids_TK >= 0
    zeros_N = (hidden_TKF.abs() <= threshold).sum(-1)[used_TK]
    chosen_N = ids_TK[used_TK]
    none_E = torch.zeros(experts.dispatcher.placement.num_experts, dtype=torch.int64, device=x_TD.device)
    return ZeroActivations(none_E.index_add(0, chosen_N, zeros_N),
                           none_E.index_add(0, chosen_N, torch.full_like(chosen_N, hidden_TKF.shape[-1])))
