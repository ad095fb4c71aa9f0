"""Checks of a router: what every router promises, tried on a few tokens.

Shapes: T tokens, D model width, E experts, K slots.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.check.findings import Check, NotTried, checks_of
from moetrain.routers.base import Router, RouterContext, Routing
from moetrain.routers.context import token_context

TOKENS = 12
_KEYED = ("draw random numbers with moetrain/ops/keyed_random.py, keep no state between calls, and decide "
          "for each token by itself; or say causal = False")


class Subject(NamedTuple):
    """The router that is checked.

    Attributes:
        make: builds the router in float64, with start values; two that it builds are equal.
        dim: D.
    """

    make: Callable[[], Router]
    dim: int

    def tokens(self, count: int = TOKENS, seed: int = 0) -> Tensor:
        """Draw tokens [T, D], the same at every call."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.dim, generator=generator, dtype=torch.float64)


def router_checks(make: Callable[[], Router], dim: int) -> Iterator[Check]:
    """List the checks of a router, as in `Subject`."""
    return checks_of({
        "a decision is well formed": (
            _is_well_formed, "used slots come first, unused ones are -1 with weight 0, no expert twice, "
            "weights float32 or better and finite"),
        "the same tokens decide the same again": (_repeats, _KEYED),
        "a token decides alike alone and in any batch, and statistics are sums over tokens": (
            _ignores_the_split, _KEYED),
        "a token does not see later tokens": (_is_causal, "say causal = False; generation then refuses it"),
        "padding of any content leaves no trace": (
            _ignores_padding, "choose through Router.decision, or use drop_padding and router_sums"),
        "it reads no more of the context than depends_on says": (
            _reads_what_it_says, "name the fields of RouterContext in depends_on"),
        "gradients are those of finite differences": (
            _has_gradients, "compute weights and probabilities by differentiable operations"),
        "end_of_step is the same on every rank": (
            _steps_alike, "let end_of_step depend on its arguments and on buffers alone"),
    }, Subject(make, dim))


def context_of(count: int = TOKENS, first: int = 0, valid_T: Tensor | None = None) -> RouterContext:
    """Context of `count` tokens of one sample, from position `first` on."""
    ids_BS = (torch.arange(first, first + count) % 7)[None]
    made = token_context(ids_BS, seed=3, step=5, training=True, sample_ids_B=torch.tensor([11]),
                         domains_B=torch.tensor([1]), first=first)
    return made._replace(router="layers.0.moe", valid_T=made.valid_T if valid_T is None else valid_T)


def _is_well_formed(subject: Subject) -> None:
    router = subject.make()
    for x_TD in (subject.tokens(0), subject.tokens(1), subject.tokens(40), 0 * subject.tokens(3)):
        count = len(x_TD)
        routing = router.route(x_TD, context_of(count))
        ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
        assert ids_TK.dtype == torch.int64, f"ids have dtype {ids_TK.dtype}, not int64"
        shape = (count, router.max_slots())
        assert ids_TK.shape == weights_TK.shape == shape, (
            f"ids have shape {list(ids_TK.shape)} and weights {list(weights_TK.shape)}, not {list(shape)}")
        assert ((ids_TK >= -1) & (ids_TK < router.num_experts)).all(), "an id is no expert and not -1"
        assert weights_TK.isfinite().all(), "a weight is not finite"
        assert weights_TK.dtype in (torch.float32, torch.float64), f"weights are {weights_TK.dtype}"
        assert not weights_TK[ids_TK < 0].any(), "an unused slot has a weight"
        for row in ids_TK.tolist():
            used = [expert for expert in row if expert >= 0]
            assert row[:len(used)] == used, f"an unused slot stands before a used one: {row}"
            assert len(set(used)) == len(used), f"an expert is chosen twice: {row}"
        stats = routing.stats
        assert stats.counts_E.sum() == stats.active_sum, "counts do not add up to the used slots"
        assert stats.active_sum >= (ids_TK >= 0).sum(), "statistics count fewer slots than are used"
        counted = int(stats.tokens)
        assert counted == count, f"statistics count {counted} of {count} tokens"


def _repeats(subject: Subject) -> None:
    router = subject.make()
    first, *others = (each.route(subject.tokens(), context_of()) for each in (router, router, subject.make()))
    for again in others:
        _equal(first, again, "a second call")


def _ignores_the_split(subject: Subject) -> None:
    router, x_TD = subject.make(), subject.tokens()
    if not router.causal or router.depends_on_split:
        raise NotTried("the router says causal = False" if not router.causal else
                       f"the router says that it depends on {router.depends_on_split}")
    together = router.route(x_TD, context_of())
    for size in (1, 4):
        parts = [router.route(x_TD[i:i + size], context_of(size, i)) for i in range(0, TOKENS, size)]
        joined = Routing(torch.cat([part.ids_TK for part in parts]),
                         torch.cat([part.weights_TK for part in parts]), 0, together.stats)
        _equal(together, joined, f"{size} tokens at a time")
        for name, total in together.stats._asdict().items():
            if isinstance(total, Tensor):
                summed = sum(getattr(part.stats, name) for part in parts)
                assert torch.allclose(summed.double(), total.double(), rtol=1e-9, atol=1e-12), (
                    f"{name} of {TOKENS} tokens is {_short(total)}, and {_short(summed)} as a sum of parts")


def _is_causal(subject: Subject) -> None:
    router, x_TD = subject.make(), subject.tokens()
    if not router.causal:
        raise NotTried("the router says causal = False")
    before = router.route(x_TD, context_of())
    half = TOKENS // 2
    x_TD[half:] = 3 * subject.tokens(seed=1)[half:]
    after = router.route(x_TD, context_of())
    same = after.ids_TK[:half].equal(before.ids_TK[:half])
    assert same, "earlier tokens choose other experts if later tokens change"


def _ignores_padding(subject: Subject) -> None:
    router, x_TD = subject.make(), subject.tokens()
    valid_T = torch.arange(TOKENS) % 4 < 3
    context = context_of(valid_T=valid_T)
    clean = router.route(x_TD.where(valid_T[:, None], 0), context)
    x_TD[~valid_T] = 1e300
    padded = router.route(x_TD, context)
    assert (padded.ids_TK[~valid_T] == -1).all(), "padding has chosen an expert"
    _equal(clean, padded, "other padding")
    for name, its, ours in zip(clean.stats._fields, clean.stats, padded.stats):
        if isinstance(its, Tensor):
            assert torch.allclose(its.double(), ours.double()), f"{name} depends on what padding holds"


def _reads_what_it_says(subject: Subject) -> None:
    router, whole = subject.make(), context_of()
    told = {field for field in RouterContext._fields if field.endswith("_T") or field == "carry"}
    unsaid = told - {"valid_T"} - router.depends_on
    nothing: dict[str, Any] = dict.fromkeys(unsaid)
    hidden = whole._replace(**nothing)
    try:
        least = router.route(subject.tokens(), hidden)
    except (TypeError, AttributeError, AssertionError) as error:
        without = ", ".join(sorted(unsaid))
        raise AssertionError(f"without {without}: {type(error).__name__}: {error}") from error
    _equal(router.route(subject.tokens(), whole), least, "the fields of depends_on alone")


def _has_gradients(subject: Subject) -> None:
    router = subject.make()
    trained = [parameter for parameter in router.parameters() if parameter.requires_grad]

    # An estimated gradient is none of the decisions of training; those of evaluation have a derivative.
    context = context_of(3)._replace(training=not router.estimates_gradient)

    def outputs(x_TD: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        routing = router.route(x_TD, context)
        stats = routing.stats
        return routing.weights_TK, stats.prob_sum_E, stats.lse2_sum, stats.entropy_sum

    x_TD = subject.tokens(3).requires_grad_()
    differentiable = any(output.requires_grad for output in outputs(x_TD))
    if not trained and not differentiable:
        raise NotTried("the router trains no parameter")
    assert differentiable, "nothing that it returns has a gradient"
    torch.autograd.gradcheck(outputs, (x_TD, *trained))


def _steps_alike(subject: Subject) -> None:
    routers = subject.make(), subject.make()
    for step in range(3):
        counts = torch.arange(routers[0].num_choices) * 3 + step
        signs = torch.sign(counts.double().mean() - counts) if routers[0].needs_load_error else None
        with torch.no_grad():
            for router in routers:
                router.end_of_step(counts.clone(), 40, signs)
                router.end_of_step_together([router], [counts.clone()], 40)
    for (name, ours), its in zip(routers[0].state_dict().items(), routers[1].state_dict().values()):
        assert ours.equal(its), f"{name} differs after three equal steps"
    transient = {name for name, _ in routers[0].named_buffers()} - set(routers[0].state_dict())
    for name in transient:
        started, moved = dict(subject.make().named_buffers())[name], dict(routers[0].named_buffers())[name]
        assert moved.equal(started), f"{name} changes, but is not saved (persistent=False)"


def _equal(first: Routing, second: Routing, what: str) -> None:
    differ = int((first.ids_TK != second.ids_TK).any(-1).sum())
    assert not differ, f"with {what}, {differ} of {len(first.ids_TK)} tokens choose other experts"
    weights = (first.weights_TK - second.weights_TK).abs().max().item() if first.weights_TK.numel() else 0.0
    assert weights <= 1e-9, f"with {what}, gate weights differ by {weights:.1e}"


def _short(values: Tensor) -> str:
    return str([round(value, 6) for value in values.flatten().tolist()[:4]])
