"""Routers with the options of public families choose and weigh as these do: experts, weights and gradients.

In float64, on random tiny cases: beside the equations of their papers in numpy (`by_hand`), and beside the
routers of stock transformers. Known differences between published implementations have a test each.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.ops.gating import scatter_weights
from moetrain.ops.keyed_random import gumbel, uniform
from moetrain.routers.base import Router, RouterContext
from moetrain.routers.sigmoid import SigmoidRouter
from moetrain.routers.sparsemixer import SparseMixerRouter
from moetrain.routers.topk import TopKRouter
from tests.support.any_router import context
from tests.support.stock_transformers import in_float64, stock

T, D, CASES = 13, 5, 24


class Sizes(NamedTuple):
    """Random sizes and options of a case."""

    experts: int
    k: int
    groups: int
    kept: int
    scale: float

    @classmethod
    def drawn(cls, seed: int) -> "Sizes":
        draw = np.random.default_rng(seed)
        groups, inside = int(draw.choice([1, 2, 4])), int(draw.integers(2, 5))
        kept = int(draw.integers(1, groups + 1))
        return cls(groups * inside, int(draw.integers(1, kept * inside + 1)), groups, kept,
                   float(draw.uniform(0.5, 3)))


class Family(NamedTuple):
    """A public family: its router in transformers, and the options with which ours is the same.

    Attributes:
        module: module of transformers, and the name of its router.
        ours: arguments of our router.
        theirs: further values of its config.
        scaled: whether weights have a factor.
        grouped: whether tokens choose inside groups.
    """

    module: str
    router: str
    ours: dict[str, Any]
    theirs: dict[str, Any] = {}
    scaled: bool = False
    grouped: bool = False


RENORM, RAW = {"weights": "renorm"}, {"weights": "raw"}
FAMILIES = {
    "mixtral": Family("mixtral", "MixtralTopKRouter", RENORM),
    **{f"{family}, norm_topk_prob={norm}": Family(family, f"{name}TopKRouter", RENORM if norm else RAW,
                                                  {"norm_topk_prob": norm})
       for family, name in (("qwen3_moe", "Qwen3Moe"), ("qwen2_moe", "Qwen2Moe"), ("olmoe", "Olmoe"))
       for norm in (True, False)},
    "granitemoe": Family("granitemoe", "GraniteMoeTopKRouter", {"weights": "softmax_of_topk"}),
    "gpt_oss": Family("gpt_oss", "GptOssTopKRouter", {"weights": "softmax_of_topk", "logit_bias": True}),
    "deepseek_v2, greedy": Family("deepseek_v2", "DeepseekV2TopkRouter", RAW, {"topk_method": "greedy"},
                                  True),
    "deepseek_v2, groups": Family("deepseek_v2", "DeepseekV2TopkRouter", {**RAW, "group_score": "max"},
                                  {"topk_method": "group_limited_greedy"}, True, True),
    **{f"{family}, norm_topk_prob={norm}": Family(family, f"{name}TopkRouter", RENORM if norm else RAW,
                                                  {"norm_topk_prob": norm}, True, True)
       for family, name in (("deepseek_v3", "DeepseekV3"), ("glm4_moe", "Glm4Moe"))
       for norm in (True, False)},
}


def ours(family: Family, sizes: Sizes, seed: int) -> Router:
    """Our router with the family's options, and random tensors; biases make some scores negative."""
    sigmoid = family.module in ("deepseek_v3", "glm4_moe")
    options = dict(family.ours)
    if family.scaled:
        options["scale"] = sizes.scale
    if family.grouped:
        options |= {"num_groups": sizes.groups, "topk_groups": sizes.kept}
    cls: Callable[..., Router] = SigmoidRouter if sigmoid else TopKRouter
    router = cls(dim=D, num_experts=sizes.experts, top_k=sizes.k, **options).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.normal_(generator=draw)
    return router


def theirs(family: Family, sizes: Sizes, router: Router) -> torch.nn.Module:
    """The router of transformers with the same numbers."""
    made = in_float64(stock(family.module, family.router)(SimpleNamespace(
        hidden_size=D, num_experts=sizes.experts, num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.k, n_group=sizes.groups, topk_group=sizes.kept,
        routed_scaling_factor=sizes.scale, **family.theirs)))
    names = {"weight": router.weight.detach()}
    if isinstance(router, SigmoidRouter):
        names["e_score_correction_bias"] = router.bias
    elif router.logit_bias is not None:
        names["bias"] = router.logit_bias.detach()
    made.load_state_dict(names)
    return made


def by_hand(family: Family, sizes: Sizes, router: Router, x_TD: np.ndarray) -> np.ndarray:
    """Weights [T, E] from the papers: 0 where an expert was not chosen."""
    found = np.zeros((len(x_TD), sizes.experts))
    sigmoid = isinstance(router, SigmoidRouter)
    for token, x_D in enumerate(x_TD):
        z = router.weight.detach().numpy() @ x_D
        if not sigmoid and router.logit_bias is not None:
            z = z + router.logit_bias.detach().numpy()
        scores = 1 / (1 + np.exp(-z)) if sigmoid else np.exp(z) / np.exp(z).sum()
        order = scores + (router.bias.numpy() if sigmoid else 0)
        if family.grouped:
            groups = np.sort(order.reshape(sizes.groups, -1), 1)[:, ::-1]
            worth = groups[:, :2].sum(1) if sigmoid else groups[:, 0]
            best = set(np.argsort(-worth)[:sizes.kept])
            order = np.array([o if e // groups.shape[1] in best else -np.inf for e, o in enumerate(order)])
        chosen = np.argsort(-order)[:sizes.k]
        total = scores[chosen].sum() if family.ours["weights"] != "raw" else 1
        found[token, chosen] = (sizes.scale if family.scaled else 1) * scores[chosen] / total
    return found


def tokens(seed: int) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + seed))


def dense(router: Router, x_TD: Tensor) -> Tensor:
    routing = router.route(x_TD, RouterContext())
    assert (routing.ids_TK >= 0).all()
    return scatter_weights(routing.weights_TK, routing.ids_TK, router.num_experts)


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@every_family
def test_weights_are_those_of_the_papers(family: Family) -> None:
    for seed in range(CASES):
        sizes = Sizes.drawn(seed)
        router, x_TD = ours(family, sizes, seed), tokens(seed)
        np.testing.assert_allclose(dense(router, x_TD).detach().numpy(),
                                   by_hand(family, sizes, router, x_TD.numpy()), rtol=1e-12)


@every_family
def test_weights_and_gradients_are_those_of_transformers(family: Family) -> None:
    for seed in range(CASES):
        sizes = Sizes.drawn(seed)
        router, x_TD = ours(family, sizes, seed), tokens(seed).requires_grad_()
        other, slopes_TE = theirs(family, sizes, router), torch.randn(T, sizes.experts, dtype=torch.float64)
        _, weights_TK, ids_TK = other(x_TD)
        assert weights_TK.dtype == torch.float64
        expected_TE = scatter_weights(weights_TK, ids_TK, sizes.experts)
        found_TE = dense(router, x_TD)
        torch.testing.assert_close(found_TE, expected_TE, rtol=1e-12, atol=0)
        for mine, its in zip(*(torch.autograd.grad((made_TE * slopes_TE).sum(), [x_TD, *of.parameters()])
                               for made_TE, of in ((found_TE, router), (expected_TE, other))), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


def test_an_excluded_group_is_never_chosen_however_low_the_scores() -> None:
    """DeepSeek's inference code and transformers 5.24 exclude by -inf, earlier transformers by 0.

    With 0 an excluded expert outranks an allowed one whose score with bias is negative, so the two differ
    where fewer than K allowed experts have a positive one: after many updates against overloaded experts.
    """
    family, sizes = FAMILIES["deepseek_v3, norm_topk_prob=True"], Sizes(8, 3, 4, 2, 1.0)
    differing = negative = 0
    for seed in range(CASES):
        router, x_TD = ours(family, sizes, seed), tokens(seed)
        order_TE = router.logits(x_TD).sigmoid().detach() + router.bias
        groups_TGe = order_TE.view(T, 4, 2)
        kept_TG = torch.zeros(T, 4, dtype=torch.bool).scatter(1, groups_TGe.sum(-1).topk(2).indices, True)
        allowed_TE = kept_TG.repeat_interleave(2, 1)
        by_zero_TK = order_TE.where(allowed_TE, 0).topk(3).indices
        outside_T = ~allowed_TE.gather(1, by_zero_TK).all(1)
        found_TK = router.route(x_TD, RouterContext()).ids_TK
        assert allowed_TE.gather(1, found_TK).all()
        differs_T = (found_TK.sort(1).values != by_zero_TK.sort(1).values).any(1)
        assert differs_T.equal(outside_T)
        assert outside_T.equal(((order_TE > 0) & allowed_TE).sum(1) < 3)
        differing, negative = differing + int(outside_T.sum()), negative + int((order_TE < 0).sum())
    assert differing > 0 and negative > 0


def sparsemixer(z_TE: Tensor, training: bool) -> tuple[Tensor, Tensor, Router]:
    """Ours by these logits: weights [T, E], and the leaf with their gradient."""
    router = SparseMixerRouter(dim=z_TE.shape[1], num_experts=z_TE.shape[1], top_k=2, eps=0.1).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(z_TE.shape[1]))
    leaf = z_TE.clone().requires_grad_()
    routing = router.route(leaf, context(len(z_TE), training=training))
    return scatter_weights(routing.weights_TK, routing.ids_TK, router.num_experts), leaf, router


@pytest.mark.parametrize("training", [False, True])
def test_sparsemixer_is_that_of_transformers(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, too, where its random numbers are ours. It writes 1/3 as 0.3333."""
    function, told, turn = stock("phimoe", "sparsemixer"), context(400), iter(("first", "second"))
    drawn_TK = 1 - uniform(told, 2, use="midpoint").double()
    monkeypatch.setattr(Tensor, "exponential_",
                        lambda like_TE: (-gumbel(told, 6, use=next(turn), dtype=like_TE.dtype)).exp())
    slots = iter(drawn_TK.split(1, 1))
    monkeypatch.setattr(torch, "rand_like", lambda like_T1: next(slots).to(like_T1.dtype))
    monkeypatch.setattr(Tensor, "uniform_", lambda drawn_T1: drawn_T1)
    z_TE = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found_TE, ours_TE, _ = sparsemixer(z_TE, training)
    theirs_TE = z_TE.clone().requires_grad_()
    weights_TK, ids_TK = function(theirs_TE, jitter_eps=0.1, training=training)
    expected_TE = scatter_weights(weights_TK, ids_TK, 6)
    torch.testing.assert_close(found_TE, expected_TE, rtol=2e-4 if training else 1e-12, atol=0)
    slopes_TE = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (mine,), (its,) = (torch.autograd.grad((made_TE * slopes_TE).sum(), [leaf_TE])
                       for made_TE, leaf_TE in ((found_TE, ours_TE), (expected_TE, theirs_TE)))
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-13)
