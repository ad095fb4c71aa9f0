"""A mixture-of-experts transformer written a second time, to compare with; it imports nothing of moetrain.

Every expert computes every token, and a gate matrix [T, E] with zeros for what was not chosen adds them up:

    y_t = sum_e g_te W_down_e (silu(W_gate_e x_t) * W_up_e x_t)

No dispatch, no grouped matmul, no hand-written gradient. `oracle_loss` is the loss of one optimizer step over
the micro-batches of all ranks, so one process says what any mesh must give.

Parameters are [out, in]; `qkv` stacks q, k and v rows, `gate_up` gate and up rows.
Shapes: B sequences, S positions, T = B * S, D width, H heads, h width of a head, E experts, F hidden width.
"""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pools = Callable[[int], Iterable[int]]
Forced = dict[int, Tensor | Callable[[Tensor], Tensor]]


class Routed(NamedTuple):
    """What one router decided in one micro-batch; valid tokens only."""

    probs_TE: Tensor
    chosen_TE: Tensor                        # before a capacity policy drops any
    lse_T: Tensor
    kept_TE: Tensor


def oracle_loss(params: dict[str, Tensor], batches: list[tuple[Tensor, Tensor, Tensor]], *,
                balance_weight: float = 0.0, balance_scope: str = "global", z_weight: float = 0.0,
                balance_pools: Pools | list[Pools] | None = None, balance_prior: list[Tensor] | None = None,
                **model) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss of one optimizer step over all micro-batches of all ranks.

    Args:
        params: parameters by name.
        batches: tokens, targets and valid positions of each micro-batch, [B, S] each.
        balance_weight: factor of the balance loss.
        balance_scope: global, micro or none.
        z_weight: factor of the z-loss.
        balance_pools: for the number of a batch, those whose counts give its f, in all routers or by router;
            it takes the place of the scope.
        balance_prior: counts of another step by router, whose shares stand for the tokens that such a pool
            lacks.
        **model: as for `oracle_logits`.

    Returns:
        The total; the cross-entropy, a mean over all scored tokens of the step; the global balance loss,
        unweighted, perfect = 1; the tokens per expert of each MoE layer.
    """
    tokens = sum(int(valid_BS.sum()) for _, _, valid_BS in batches)
    ce_sum, routed = 0.0, []
    for tokens_BS, targets_BS, valid_BS in batches:
        logits_BSV, layers = oracle_logits(params, tokens_BS, valid_BS, **model)
        scored_BS = targets_BS >= 0
        ce_sum = ce_sum + F.cross_entropy(logits_BSV[scored_BS], targets_BS[scored_BS], reduction="sum")
        routed.append(layers)
    per_router = list(zip(*routed))                              # [router][micro-batch]
    scored = sum(int((targets_BS >= 0).sum()) for _, targets_BS, _ in batches)
    ce, zero = ce_sum / scored, torch.zeros((), dtype=logits_BSV.dtype)
    balance, micro, z = zero, zero, zero
    for router in per_router:
        pooled = Routed(*(torch.cat(field) for field in zip(*router)))
        balance = balance + _balance(pooled) / len(per_router)
        micro = micro + sum(_balance(part) * len(part.lse_T) / tokens for part in router) / len(per_router)
        z = z + pooled.lse_T.square().mean() / len(per_router)
    scoped = {"global": balance, "micro": micro, "none": zero}[balance_scope]
    if balance_pools is not None:
        pools = balance_pools if isinstance(balance_pools, list) else [balance_pools] * len(per_router)
        priors = balance_prior or [None] * len(per_router)
        scoped = sum(_pooled(router, of_router, tokens, prior) / len(per_router)
                     for router, of_router, prior in zip(per_router, pools, priors, strict=True))
    counts = [sum(part.chosen_TE.sum(0) for part in router) for router in per_router]
    return ce + balance_weight * scoped + z_weight * z, ce, balance, counts


def _pooled(router: tuple[Routed, ...], pools: Pools, tokens: int, prior_E: Tensor | None) -> Tensor:
    """One router's loss where every batch has a pool of its own."""
    total = 0.0
    for number, batch in enumerate(router):
        counts_E = sum(router[other].chosen_TE.sum(0) for other in pools(number)).double()
        if prior_E is not None:
            slots = sum(int(part.chosen_TE.sum()) for part in router)
            counts_E = counts_E + (slots - counts_E.sum()) * prior_E.double() / prior_E.sum()
        share_E = counts_E / counts_E.sum().clamp(min=1)
        total = total + len(counts_E) * (share_E * batch.probs_TE.sum(0)).sum() / tokens
    return total


def _balance(routed: Routed) -> Tensor:
    """E sum_i f_i P_i over the tokens given; f is a constant."""
    counts_E = routed.chosen_TE.sum(0)
    # int / int would be float32
    share_E = counts_E.to(routed.probs_TE.dtype) / counts_E.sum().clamp(min=1)
    return len(counts_E) * (share_E * routed.probs_TE.sum(0)).sum() / max(len(routed.probs_TE), 1)


def oracle_logits(params: dict[str, Tensor], tokens_BS: Tensor, valid_BS: Tensor, *, num_layers: int,
                  num_heads: int, num_kv_heads: int, head_dim: int, top_k: int | list[int],
                  num_experts: int | list[int], num_shared_experts: int = 0, first_dense_layers: int = 0,
                  moe_layers: Sequence[int] | None = None,
                  qk_norm: bool = False, rope_theta: float = 10000.0, norm_eps: float = 1e-6,
                  tie_embeddings: bool = False, gate: str = "renorm", forced: Forced | None = None,
                  bias: dict[int, Tensor] | None = None, **routing) -> tuple[Tensor, list[Routed]]:
    """Logits [B, S, V] of one micro-batch and what each MoE layer's router decided.

    Sizes and switches are named as in the config. `gate` is renorm (weights sum to one over the chosen) or
    raw (the probabilities themselves). `forced` gives the expert ids of a layer for every token, [K] or [T,
    K], or a function of the probabilities [T, E] that returns them. `bias` is what a layer adds to the scores
    to choose. `routing` is handed to `_moe`.
    """
    x_BSD, layers = params["embed"][tokens_BS], []
    for layer in range(num_layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        normed_BSD = _rms_norm(x_BSD, own["attention_norm"], norm_eps)
        x_BSD = x_BSD + _attention(own, normed_BSD, num_heads, num_kv_heads, head_dim, qk_norm, rope_theta,
                                   norm_eps)
        normed_TD = _rms_norm(x_BSD, own["ffn_norm"], norm_eps).flatten(0, 1)
        if layer < first_dense_layers or moe_layers is not None and layer not in moe_layers:
            out_TD = _swiglu(normed_TD, own["ffn.gate_up"], own["ffn.down"])
        else:
            out_TD, routed = _moe(own, normed_TD, valid_BS, _entry(num_experts, layer), _entry(top_k, layer),
                                  gate, (forced or {}).get(layer), (bias or {}).get(layer, 0.0), **routing)
            layers.append(routed)
            if num_shared_experts:
                out_TD = out_TD + _swiglu(normed_TD, own["moe.shared.gate_up"], own["moe.shared.down"])
        x_BSD = x_BSD + out_TD.view_as(x_BSD)
    head_VD = params["embed"] if tie_embeddings else params["head"]
    return _rms_norm(x_BSD, params["norm"], norm_eps) @ head_VD.T, layers


def _moe(own: dict[str, Tensor], x_TD: Tensor, valid_BS: Tensor, num_experts: int, top_k: int, gate: str,
         choice: Tensor | Callable | None, bias_E: Tensor | float, *, sigmoid: bool = False,
         scale: float = 1.0, groups: tuple[int, int, int] = (1, 1, 1),
         capacity: dict | None = None) -> tuple[Tensor, Routed]:
    """A MoE layer: router, capacity, experts.

    With `sigmoid`, scores are that of the logits instead of their softmax. `scale` is a factor of the gates.
    `groups` are the groups there are, those that a token uses, and the scores that add up to a group's.
    `capacity` holds the arguments of `_within_capacity`, and `renorm`.
    """
    valid_T = valid_BS.flatten()
    logits_TE = x_TD @ own["moe.router"].T
    scores_TE = 1 / (1 + (-logits_TE).exp()) if sigmoid else logits_TE.softmax(-1)
    if choice is None:
        ids_TK = torch.tensor([_best(row, top_k, *groups) for row in (scores_TE.detach() + bias_E).tolist()])
    else:
        ids_TK = choice(scores_TE.detach()) if callable(choice) else choice.expand(len(x_TD), -1)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, ids_TK, True) & valid_T[:, None]
    gates_TE = scale * scores_TE * chosen_TE
    if gate == "renorm":
        gates_TE = scale * gates_TE / gates_TE.sum(-1, keepdim=True).where(valid_T[:, None], 1.0)
    kept_TE = chosen_TE
    if capacity is not None:
        kept_TE = _within_capacity(ids_TK.tolist(), gates_TE.tolist(), valid_BS, **capacity)
        left_TE = gates_TE * kept_TE
        if capacity.get("renorm"):
            left_TE = left_TE * (gates_TE.sum(1) / left_TE.sum(1).where(kept_TE.any(1), 1.0))[:, None]
        gates_TE = left_TE
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    gate_up_EGD = torch.stack([own[f"moe.experts.{e}.gate_up"] for e in range(num_experts)])
    down_EDF = torch.stack([own[f"moe.experts.{e}.down"] for e in range(num_experts)])
    gated_ETF, up_ETF = torch.einsum("td,egd->etg", x_TD, gate_up_EGD).chunk(2, dim=-1)
    out_TD = torch.einsum("te,etf,edf->td", gates_TE, F.silu(gated_ETF) * up_ETF, down_EDF)
    lse_T = logits_TE[valid_T].logsumexp(-1)
    return out_TD, Routed(probs_TE[valid_T], chosen_TE[valid_T], lse_T, kept_TE[valid_T])


def _best(scores: list[float], top_k: int, num_groups: int, topk_groups: int, summed: int) -> list[int]:
    """Ids of a token's best scores, ties to lower ids, in the groups whose best `summed` add up to most."""
    size = len(scores) // num_groups
    members = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    worth = [sum(sorted((scores[e] for e in group), reverse=True)[:summed]) for group in members]
    best_groups = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:topk_groups]
    inside = [e for group in best_groups for e in members[group]]
    return sorted(inside, key=lambda e: (-scores[e], e))[:top_k]


def _within_capacity(ids: list[list[int]], gates: list[list[float]], valid_BS: Tensor, *, policy: str,
                     factor: float, at_least: int, renorm: bool = False, together: bool = False) -> Tensor:
    """Which choices [T, E] fit into the experts of their sequence, one choice after the other.

    `policy` says who comes first: position, all first choices in order of tokens, then all second; token, in
    order of tokens; prob, the largest gates, equal to 32 bits. With `together` all sequences are one.
    """
    kept_TE = torch.zeros(len(ids), len(gates[0]), dtype=torch.bool)
    scopes = valid_BS.flatten()[None] if together else valid_BS
    for number, valid_S in enumerate(scopes.tolist()):
        tokens = [number * len(valid_S) + s for s, valid in enumerate(valid_S) if valid]
        choices = [(t, k, e) for t in tokens for k, e in enumerate(ids[t])]
        order = {"position": lambda c: (c[1], c[0]), "token": lambda c: (c[0], c[1]),
                 "priority": lambda c: (c[1], -round(max(gates[c[0]]) * 2**32), c[0]),
                 "prob": lambda c: (-round(gates[c[0]][c[2]] * 2**32), c[0], c[1])}[policy]
        room = [max(at_least, -(-Fraction(str(factor)) * len(choices) // len(gates[0])))] * len(gates[0])
        for t, _, e in sorted(choices, key=order):
            kept_TE[t, e] = room[e] > 0
            room[e] -= 1
    return kept_TE


def _attention(own: dict[str, Tensor], x_BSD: Tensor, heads: int, kv_heads: int, head_dim: int, qk_norm: bool,
               theta: float, eps: float) -> Tensor:
    batch, length, _ = x_BSD.shape
    qkv_BSHh = (x_BSD @ own["attention.qkv"].T).view(batch, length, -1, head_dim)
    q_BSHh, k_BSHh, v_BSHh = qkv_BSHh.split([heads, kv_heads, kv_heads], dim=2)
    if qk_norm:
        q_BSHh = _rms_norm(q_BSHh, own["attention.q_norm"], eps)
        k_BSHh = _rms_norm(k_BSHh, own["attention.k_norm"], eps)
    q_BSHh, k_BSHh = _rotate(q_BSHh, theta), _rotate(k_BSHh, theta)
    k_BSHh, v_BSHh = (part.repeat_interleave(heads // kv_heads, dim=2) for part in (k_BSHh, v_BSHh))
    scores_BHST = torch.einsum("bshc,bthc->bhst", q_BSHh, k_BSHh) * head_dim ** -0.5
    weights_BHST = (scores_BHST + torch.full((length, length), float("-inf")).triu(1)).softmax(-1)
    return torch.einsum("bhst,bthc->bshc", weights_BHST, v_BSHh).flatten(2) @ own["attention.out"].T


def _rotate(x_BSHh: Tensor, theta: float) -> Tensor:
    """Rotary embedding in the half-split form: entry i turns with entry i + h/2."""
    length, half = x_BSHh.shape[1], x_BSHh.shape[-1] // 2
    freqs = theta ** (-torch.arange(half, dtype=x_BSHh.dtype) / half)
    angle = (torch.arange(length, dtype=x_BSHh.dtype)[:, None] * freqs)[None, :, None, :]
    first, second = x_BSHh.split(half, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(),
                      second * angle.cos() + first * angle.sin()], -1)


def _swiglu(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x_TD @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _entry(value: int | list[int], layer: int) -> int:
    return value if isinstance(value, int) else value[layer]
