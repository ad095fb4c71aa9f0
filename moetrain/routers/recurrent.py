"""Recurrent routing over layers (RMoE): a router knows what the routers of earlier layers have seen.

    x' = x P^T                      P [H, D], of each layer
    h  = cell(x', h_before)         one cell for all layers; 0 before the first layer with experts
    z  = h W^T,  p = softmax(z)     W [E, H], of each layer; the k largest p are chosen

    gru        r = sigmoid(A_r x' + B_r h + b),  u = sigmoid(A_u x' + B_u h + b)
               c = tanh(A_c x' + a_c + r (B_c h + b_c)),  h' = (1 - u) c + u h
    rnn        h' = tanh(A x' + B h + b)
    identity   h' = x', which is topk on a matrix of two factors

The state goes over depth, each token for itself: nothing is carried over the sequence, and generation needs
no cache for it. Dense layers pass it on.

Qiu et al. 2024, "Layerwise Recurrent Router for Mixture-of-Experts" (arXiv 2408.06793), and its released code
(qiuzh20/RMoE), whose cells these are, with matrices and biases that start like other matrices. Its default is
H = 256; the paper finds 128 best, and detaching the state worse than no recurrence: both are options here for
comparison, and `reset=every_layer` is the paper's arm without passing the state. The cell is written out of
place, since torch's writes into parts of a product that recomputation holds.

Shapes: T tokens, D model width, E experts, K slots, H state width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moetrain.ops.start import Start, normal
from moetrain.routers.base import RouterContext, Scores
from moetrain.routers.topk import TopKRouter

NAME = "recurrent"                           # of the cell in `Transformer.tied`
_GATES = {"gru": 3, "rnn": 1}                # maps of a cell


class RecurrentCell(nn.Module):
    """Gated or plain recurrent cell, with torch's order of gates: reset, update, candidate.

    Args:
        width: H, of input and state.
        kind: gru or rnn.
    """

    def __init__(self, *, width: int, kind: Literal["gru", "rnn"]) -> None:
        super().__init__()
        rows = _GATES[kind] * width
        self.kind = kind
        self.weight_ih = nn.Parameter(torch.empty(rows, width))
        self.weight_hh = nn.Parameter(torch.empty(rows, width))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def starts(self) -> dict[str, Start]:
        return {name: normal() for name, _ in self.named_parameters()}

    def forward(self, x_TH: Tensor, state_TH: Tensor) -> Tensor:
        """Compute the next state [T, H]."""
        seen = linear(x_TH, self.weight_ih, self.bias_ih)
        kept = linear(state_TH, self.weight_hh, self.bias_hh)
        if self.kind == "rnn":
            return (seen + kept).tanh()
        (seen_r, seen_u, seen_c), (kept_r, kept_u, kept_c) = seen.chunk(3, -1), kept.chunk(3, -1)
        update_TH = (seen_u + kept_u).sigmoid()
        candidate_TH = (seen_c + (seen_r + kept_r).sigmoid() * kept_c).tanh()
        return (1 - update_TH) * candidate_TH + update_TH * state_TH


class RecurrentRouter(TopKRouter):
    """Softmax top-k router of a state that is carried from layer to layer.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        state_dim: H, width of the state.
        cell: gru, rnn, or identity, which has no state.
        shared_cell: one cell for all layers; otherwise each layer has its own.
        detach: stop the gradient at the state of the layer before.
        reset: never, or every_layer: the state of the layer before is not used.
        weights: convention of the gate weights: renorm or raw.
        scale: factor of the gate weights.
    """

    BOUNDS = {"state_dim": "1 or more"}
    CONSTANT_WEIGHTS = {"weights": ["renorm"]}
    SHAPES = {"weight": ("E", "state_dim"), "project": ("state_dim", "D"),
              "cell.weight_ih": ("0 if shared_cell else (3 if cell == 'gru' else cell == 'rnn') * state_dim",
                                 "state_dim"),
              "cell.weight_hh": ("0 if shared_cell else (3 if cell == 'gru' else cell == 'rnn') * state_dim",
                                 "state_dim"),
              "cell.bias_ih": ("0 if shared_cell else (3 if cell == 'gru' else cell == 'rnn') * state_dim",),
              "cell.bias_hh": ("0 if shared_cell else (3 if cell == 'gru' else cell == 'rnn') * state_dim",)}
    SHARED_SHAPES = {
        "recurrent.weight_ih": ("shared_cell * (3 if cell == 'gru' else cell == 'rnn') * state_dim",
                                "state_dim"),
        "recurrent.weight_hh": ("shared_cell * (3 if cell == 'gru' else cell == 'rnn') * state_dim",
                                "state_dim"),
        "recurrent.bias_ih": ("shared_cell * (3 if cell == 'gru' else cell == 'rnn') * state_dim",),
        "recurrent.bias_hh": ("shared_cell * (3 if cell == 'gru' else cell == 'rnn') * state_dim",)}
    depends_on = frozenset({"carry", "tied"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, state_dim: int = 128,
                 cell: Literal["gru", "rnn", "identity"] = "gru", shared_cell: bool = True,
                 detach: bool = False, reset: Literal["never", "every_layer"] = "never",
                 weights: Literal["renorm", "raw"] = "renorm", scale: float = 1.0) -> None:
        super().__init__(dim=state_dim, num_experts=num_experts, top_k=top_k, weights=weights, scale=scale)
        assert cell in (*_GATES, "identity") and reset in ("never", "every_layer"), (cell, reset)
        self.state_dim, self.kind = state_dim, cell
        self.shared_cell, self.detach, self.reset = shared_cell, detach, reset
        self.project = nn.Parameter(torch.empty(state_dim, dim))
        self.cell = None if cell == "identity" or shared_cell else self._make_cell()

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "project": normal()}

    def shared_modules(self) -> dict[str, nn.Module]:
        """The cell, unless each layer has its own."""
        return {NAME: self._make_cell()} if self.kind != "identity" and self.shared_cell else {}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by their probability, and carry the state on."""
        state_TH = self.state(x_TD, context)
        logits_TE = self.logits(state_TH)
        probs_TE = logits_TE.softmax(-1)
        passed = self.kind != "identity" and self.reset == "never"
        return Scores(probs_TE, probs_TE, logits_TE, state_TH if passed else None)

    def state(self, x_TD: Tensor, context: RouterContext) -> Tensor:
        """Compute the state [T, H] of this layer."""
        x_TH = linear(x_TD.to(self.project.dtype), self.project)
        if self.kind == "identity":
            return x_TH
        before_TH = None if self.reset == "every_layer" else context.carry
        if before_TH is None:
            before_TH = torch.zeros_like(x_TH)
        if self.detach:
            before_TH = before_TH.detach()
        return (self.cell or self.shared(NAME, context))(x_TH, before_TH)

    def _make_cell(self) -> RecurrentCell:
        assert self.kind != "identity"
        return RecurrentCell(width=self.state_dim, kind=self.kind)
