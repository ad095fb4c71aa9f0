"""The CUDA kernels, run thread by thread on the CPU (cuda_on_host.h), against the references of moetrain/ops.

No GPU is involved: this is about indices, masks, barriers and arithmetic. Every case runs in several orders
of the threads, and the bits must agree: what differs is a missing barrier.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from moetrain.ops import (
    permute as rows_ops,
    route_plan as plan_ops,
    router as router_ops,
    swiglu as swiglu_ops,
)
from moetrain.ops.grouped_gemm import grouped_wgrad_
from moetrain.ops.permute import plan_permutation
from moetrain.ops.route_plan import route_plan
from moetrain.ops.router import RouterRule
from tests.ops.kernels_on_host import (
    ORDERS,
    SUFFIX,
    arithmetic,
    call,
    check_guards,
    library,
    poisoned,
    unaligned,
)
from tests.support.peer_rows import CASES

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float64: 1e-12}


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """|error| / |expected| over the whole tensor; NaN never passes."""
    got, expected = got.double(), expected.double()
    return bool((got - expected).norm() <= tolerance * expected.norm()) and got.isfinite().all().item()


def in_all_orders(outputs, launch) -> list[Tensor]:
    """Outputs of the kernel, the same bits in every order of the threads, and nothing written beside them."""
    results = []
    for order in ORDERS:
        made = outputs()
        launch(made, order)
        check_guards(*made)
        results.append(made)
    for other in results[1:]:
        for first, again in zip(results[0], other):
            assert first.equal(again), "the order of the threads changed a result"
    return results[0]


# ---- the emulation itself ----

@pytest.mark.parametrize("which, found", [(1, "divergent"), (2, "divergent"), (3, "overrun")])
def test_the_emulation_finds_what_is_wrong_with_a_kernel(which, found):
    function = library().wrong
    function.restype = ctypes.c_char_p
    into = torch.zeros(64, dtype=torch.int32)
    failure = function(ctypes.c_int(0), ctypes.c_int(which), ctypes.c_void_p(into.data_ptr()))
    assert found in failure.decode()


def test_a_missing_barrier_shows_in_the_order_of_threads():
    def run(order: int) -> Tensor:
        into = torch.zeros(64, dtype=torch.int32)
        assert library().wrong(ctypes.c_int(order), ctypes.c_int(0),
                               ctypes.c_void_p(into.data_ptr())) in (None, 0)
        return into
    assert not run(0).equal(run(1))


# ---- route plan ----

def physical_ids(tokens: int, slots: int, physical: int, unused: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + 31 * slots + 7 * physical)
    ids_TK = torch.randint(0, physical, (tokens, slots), generator=generator)
    return ids_TK.where(torch.rand(tokens, slots, generator=generator) >= unused, -1)


PLANS = {
    "no tokens": (physical_ids(0, 2, 4), 4),
    "one token": (torch.tensor([[2]]), 4),
    "all to one": (torch.full((70, 2), 3), 5),
    "nothing used": (torch.full((40, 3), -1), 5),
    "one expert": (torch.zeros(33, 1, dtype=torch.int64), 1),
    "several units": (physical_ids(700, 4, 10), 10),
    "more ids than a block has threads": (physical_ids(150, 8, 600), 600),
    "fewer warps than usual": (physical_ids(400, 8, 2500), 2500),
    "ids out of range": (torch.tensor([[0, 9], [-5, 1]]), 2),
}


@pytest.mark.parametrize("alignment", [1, 16, 128])
@pytest.mark.parametrize("case", PLANS)
def test_route_plan(case, alignment):
    ids_TK, physical = PLANS[case]
    used = ((ids_TK >= 0) & (ids_TK < physical)).sum().item()
    most = used + (alignment - 1) * physical
    for max_rows in {0, used // 2, used, most + 5}:
        expected = plan_ops._reference(ids_TK, physical, max_rows, alignment)
        scratch = poisoned(arithmetic("plan_scratch", ids_TK.numel(), physical) // 4, dtype=torch.int32)
        got = in_all_orders(
            lambda: [poisoned(max_rows, dtype=torch.int64), poisoned(*ids_TK.shape, dtype=torch.int64),
                     poisoned(physical, dtype=torch.int64), poisoned(physical, dtype=torch.int32)],
            lambda out, order: call("route_plan", ids_TK, *out, scratch, ids_TK.numel(), physical, max_rows,
                                    alignment,
                                    order=order))
        check_guards(scratch)
        assert all(a.equal(b) for a, b in zip(got, expected))


# ---- rows ----

def row_plans() -> dict[str, tuple[Tensor, Tensor]]:
    exact = plan_permutation(physical_ids(37, 3, 5), 5)
    return {
        "exact": exact[:2],
        "padded": route_plan(physical_ids(21, 2, 4), 4, 60).permutation[:2],
        "aligned": route_plan(physical_ids(21, 16, 4), 4, 450, 16).permutation[:2],
        "k is one": plan_permutation(torch.tensor([[1], [-1], [0]]), 2)[:2],
        "nothing used": route_plan(torch.full((5, 2), -1), 3, 7).permutation[:2],
        "no tokens": route_plan(torch.zeros(0, 2, dtype=torch.int64), 3, 9).permutation[:2],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 136, 520])
@pytest.mark.parametrize("case", row_plans())
def test_permute_and_unpermute(case, width, dtype):
    slots_R, rows_TK = row_plans()[case]
    tokens, slots = rows_TK.shape
    x_TD = torch.randn(tokens, width, dtype=torch.float64).to(dtype)
    y_RD = torch.randn(len(slots_R), width, dtype=torch.float64).to(dtype)
    y_RD[slots_R < 0] = torch.nan                        # must not reach anything
    for x_TD, y_RD in ((x_TD, y_RD), (unaligned(x_TD), unaligned(y_RD))):
        (got,) = in_all_orders(lambda: [poisoned(len(slots_R), width, dtype=dtype)], lambda out, order: call(
            "permute", x_TD, slots_R, rows_TK, *out, tokens, slots, len(slots_R), width * dtype.itemsize,
            order=order))
        assert got.equal(rows_ops.gather_padded(x_TD, slots_R, rows_TK))
        (got,) = in_all_orders(lambda: [poisoned(tokens, width, dtype=dtype)], lambda out, order: call(
            f"unpermute_{SUFFIX[dtype]}", y_RD, rows_TK, *out, tokens, slots, len(slots_R), width,
            order=order))
        assert got.equal(rows_ops.sum_padded(y_RD, slots_R, rows_TK))       # the same order of additions


# ---- rows into the memory of peers ----

@pytest.mark.parametrize("shift", [0, 4, 1])
@pytest.mark.parametrize("case", CASES)
def test_push(case, shift):
    sent, there, width = CASES[case]
    rows_NB = torch.randint(0, 250, (sum(sent), width), dtype=torch.uint8)

    def push(areas: list[Tensor], order: int) -> None:
        pointers = torch.tensor([area.data_ptr() + shift for area in areas])
        call("push", rows_NB, pointers, torch.tensor(sent), torch.tensor(there), len(sent), len(sent) - 1,
             width, order=order)

    got = in_all_orders(lambda: [poisoned((begin + many + 1) * width + shift, dtype=torch.uint8)
                                 for begin, many in zip(there, sent)], push)
    for area, rows, begin in zip(got, rows_NB.split(sent), there):
        expected = torch.full_like(area, -77)
        expected[shift + begin * width:shift + (begin + len(rows)) * width] = rows.flatten()
        assert area.equal(expected)


# ---- SwiGLU ----

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, used", [(0, 8, None), (1, 1, None), (5, 7, 3), (9, 8, 0), (9, 24, 9),
                                               (3, 520, 2)])
def test_swiglu_and_its_backward(rows, width, used, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    h, grad = (torch.randn(rows, w, dtype=torch.float64).to(dtype) for w in (2 * width, width))
    weights = torch.rand(rows, dtype=wide)
    ends = None if used is None else torch.tensor([used], dtype=torch.int32)
    exact = [t.double() for t in (grad, h, weights)]
    hidden, *expected = swiglu_ops._reference_backward(*[t.clone() for t in exact], ends)
    if used is not None:
        h[used:], grad[used:] = torch.nan, torch.nan
    for h, grad in ((h, grad), (unaligned(h), unaligned(grad))):
        (got,) = in_all_orders(lambda: [poisoned(rows, width, dtype=dtype)], lambda out, order: call(
            f"swiglu_{SUFFIX[dtype]}", h, weights, ends, *out, rows, width, order=order))
        assert close(got, hidden, TOLERANCE[dtype])
        got = in_all_orders(
            lambda: [poisoned(rows, width, dtype=dtype), poisoned(rows, 2 * width, dtype=dtype),
                     poisoned(rows, dtype=wide)],
            lambda out, order: call(f"swiglu_backward_{SUFFIX[dtype]}", grad, h, weights, ends, *out, rows,
                                    width, order=order))
        for mine, theirs in zip(got, (hidden, *expected)):
            assert close(mine, theirs, TOLERANCE[dtype])
            assert used is None or not mine[used:].any()


def test_swiglu_of_large_numbers_is_what_torch_says():
    h = torch.tensor([[-200.0, 200.0, -90.0, 88.0, 1.0, 1.0, 1.0, 1.0]])
    out = poisoned(1, 4, dtype=torch.float32)
    call("swiglu_float", h, torch.ones(1), None, out, 1, 4)
    torch.testing.assert_close(out, swiglu_ops._reference(h, torch.ones(1), None))


# ---- weight gradients ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts, rows, columns, padding", [
    ([5], 8, 8, 0), ([0, 33, 0, 1, 32], 8, 16, 3), ([64, 70], 72, 136, 0), ([0, 0], 8, 8, 4)])
def test_grouped_wgrad(counts, rows, columns, padding, dtype):
    total = sum(counts) + padding
    a, b = torch.randn(total, rows).to(dtype), torch.randn(total, columns).to(dtype)
    a[sum(counts):] = b[sum(counts):] = torch.nan
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    before = torch.randn(len(counts), rows, columns)
    expected = before.double()
    for e, (x, y) in enumerate(zip(a[:sum(counts)].double().split(counts),
                                   b[:sum(counts)].double().split(counts))):
        expected[e] += x.T @ y

    def start() -> list[Tensor]:
        acc = poisoned(*before.shape, dtype=torch.float32)
        return [acc.copy_(before)]

    (got,) = in_all_orders(start, lambda out, order: call(
        f"grouped_wgrad_{SUFFIX[dtype]}", a, b, ends, *out, len(counts), rows, columns, order=order))
    assert close(got, expected, 1e-5)
    for e, count in enumerate(counts):
        assert count or got[e].equal(before[e]), "an expert without rows was touched"
    reference = before.clone()
    grouped_wgrad_(a, b, ends, reference)
    assert close(reference, expected, 1e-5)


# ---- router ----

class Rule(ctypes.Structure):
    """RouterRule of csrc/router.cuh."""

    _fields_ = [("experts", ctypes.c_int), ("slots", ctypes.c_int), ("score", ctypes.c_int),
                ("renormalised", ctypes.c_bool), ("scale", ctypes.c_float), ("groups", ctypes.c_int),
                ("kept_groups", ctypes.c_int), ("top2", ctypes.c_bool)]


RULES = {
    "mixtral": (RouterRule(2), 8),
    "olmoe": (RouterRule(8, renormalised=False), 64),
    "deepseek v2": (RouterRule(6, renormalised=False, scale=16.0, groups=8, kept_groups=3), 160),
    "deepseek v3": (RouterRule(8, sigmoid=True, scale=2.5, groups=8, kept_groups=4, top2=True), 256),
    "sigmoid, raw": (RouterRule(3, sigmoid=True, renormalised=False), 33),
    "one expert": (RouterRule(1), 1),
    "groups of one": (RouterRule(2, groups=6, kept_groups=3, top2=True), 6),
    "all experts": (RouterRule(5), 5),
    "1024 experts, 16 slots": (RouterRule(16), 1024),
    "600 experts in 32 slots": (RouterRule(32, sigmoid=True), 600),
}


def logits_of(tokens: int, experts: int) -> Tensor:
    """Far enough apart that rounding decides nothing, but for columns that are exactly equal."""
    generator = torch.Generator().manual_seed(tokens + experts)
    steps = torch.zeros(0, experts)
    if tokens:
        steps = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    logits_TE = steps * (8.0 / experts) - 4.0
    logits_TE[:, experts // 2] = logits_TE[:, 0]
    return logits_TE.float()


def c_rule(rule: RouterRule, experts: int) -> Rule:
    return Rule(experts, rule.slots, int(rule.sigmoid), rule.renormalised, rule.scale, rule.groups,
                rule.kept_groups, rule.top2)


def router_on_host(logits_TE: Tensor, rule: RouterRule, bias_E=None, ids_TK=None,
                   valid_T=None) -> list[Tensor]:
    """ids, weights, lse, sums [E + 2], counts [E + 2]."""
    tokens, experts = logits_TE.shape
    blocks = arithmetic("router_blocks", tokens)

    def outputs() -> list[Tensor]:
        return [poisoned(tokens, rule.slots, dtype=torch.int64),
                poisoned(tokens, rule.slots, dtype=torch.float32),
                poisoned(tokens, dtype=torch.float32), poisoned(experts + 2, blocks, dtype=torch.float32),
                poisoned(experts + 2, blocks, dtype=torch.int32), poisoned(experts + 2, dtype=torch.float32),
                poisoned(experts + 2, dtype=torch.int64)]

    ids, weights, lse, _, _, sums, counts = in_all_orders(outputs, lambda out, order: call(
        "router", logits_TE, bias_E, ids_TK, valid_T, *out, tokens, c_rule(rule, experts), order=order))
    return [ids, weights, lse, sums, counts]


@pytest.mark.parametrize("tokens", [0, 1, 20])
@pytest.mark.parametrize("name", RULES)
def test_router(name, tokens):
    rule, experts = RULES[name]
    logits_TE = logits_of(tokens, experts)
    valid_T = torch.arange(tokens) % 5 != 3
    order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(3))
    bias_E = torch.linspace(0, 0.3, experts)[order_E]
    for bias_E, valid_T in ((None, None), (bias_E if rule.sigmoid else None, valid_T)):
        inputs = logits_TE.clone()
        if valid_T is not None:
            inputs[~valid_T] = torch.nan
        expected = router_ops._reference(inputs, bias_E, None, valid_T, *rule)
        ids, weights, lse, sums, counts = router_on_host(inputs, rule, bias_E, None, valid_T)
        (their_weights, their_lse, their_probs, *their_sums, their_ids, their_counts, their_tokens,
         their_used) = expected
        assert ids.equal(their_ids)
        assert close(weights, their_weights, 1e-5) and close(lse, their_lse, 1e-5)
        assert counts.tolist() == [*their_counts.tolist(), their_tokens, their_used]
        assert close(sums, torch.cat([their_probs, torch.stack(their_sums)]), 1e-5)
        replayed = router_on_host(inputs, rule, bias_E, ids, valid_T)
        assert all(a.equal(b) for a, b in zip(replayed, (ids, weights, lse, sums, counts)))


@pytest.mark.parametrize("top2", [False, True])
def test_the_choice_orders_nan_infinities_zeros_and_equals_as_torch_does(top2):
    inf, nan = torch.inf, torch.nan
    scores_TE = torch.tensor([[0.0, -0.0, 1.0, 1.0, -1.0, 0.0], [inf, -inf, 2.0, inf, nan, 0.5], [-inf] * 6,
                              [3.0] * 6,
                              [nan, nan, 1.0, -inf, inf, inf], [-1.0, -1.0, 5.0, -inf, 4.0, 3.0],
                              [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0]])
    rule = RouterRule(4, sigmoid=True, renormalised=False, groups=3, kept_groups=2, top2=top2)
    # a bias to zeros: sigmoid(0) = 0.5 moves all scores alike
    zeros_TE = torch.zeros(1, 6)
    for row in scores_TE:
        expected = router_ops._reference(zeros_TE, row - 0.5, None, None, *rule)[5]
        assert router_on_host(zeros_TE, rule, row - 0.5)[0].equal(expected), row


@pytest.mark.parametrize("name", RULES)
def test_router_backward(name):
    rule, experts = RULES[name]
    tokens = 9
    logits_TE = logits_of(tokens, experts)
    valid_T = torch.arange(tokens) % 4 != 1
    ids, _, lse, *_ = router_on_host(logits_TE, rule, None, None, valid_T)
    ids[3, rule.slots - 1:] = -1                         # an unused slot
    d_weights, slopes = torch.randn(tokens, rule.slots), torch.randn(experts)
    everything = (d_weights, slopes, torch.tensor(0.3), torch.tensor(-0.2))
    for grads in (everything, (None, slopes, None, None), (d_weights, None, None, None)):
        exact = [None if g is None else g.double() for g in grads]
        expected = router_ops._reference_backward(*exact, logits_TE.double(), ids, lse.double(), valid_T,
                                                  *rule[1:4])
        (got,) = in_all_orders(
            lambda: [poisoned(tokens, experts, dtype=torch.float32)],
            lambda out, order: call("router_backward", *grads, logits_TE, ids, lse, valid_T, *out, tokens,
                                    c_rule(rule, experts), order=order))
        assert close(got, expected, 1e-5) or experts == 1 and got.abs().max() < 1e-5
        assert not got[~valid_T].any()
