"""The kernels on a GPU: against float64, on poisoned outputs, twice, in a graph, beyond 2^31, with no wait.

    python tools/build_cuda.py && MOETRAIN_KERNELS=1 python -m pytest -m gpu tests/ops

Skipped without a GPU, and where the kernels are not in use. None of this has been run yet
(docs/explanation/kernels.md).
"""

import pytest
import torch
from torch import Tensor

from moetrain.ops import extension, router as router_ops, swiglu as swiglu_ops
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.grouped_gemm import grouped_wgrad_
from moetrain.ops.permute import permute_padded, unpermute_padded, values_of_rows
from moetrain.ops.route_plan import _reference as plan_reference, route_plan
from moetrain.ops.router import RouterRule, route_tokens

REASON = "no CUDA device" if not torch.cuda.is_available() else extension.absent()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
ROUTERS = {"mixtral": (RouterRule(2), 8), "olmoe": (RouterRule(8, renormalised=False), 64),
           "qwen3": (RouterRule(8), 128),
           "deepseek v3": (RouterRule(8, sigmoid=True, scale=2.5, groups=8, kept_groups=4, top2=True), 256),
           "largest": (RouterRule(16), 1024)}


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What the allocator hands out next holds NaN, or -1 as whole numbers."""
    if REASON is None:
        held = [torch.full((size,), -1, dtype=torch.int64, device="cuda")
                for size in (64, 1024, 2**17, 2**20, 2**24)]
        del held


def assert_close(got: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (got.double().cpu() - truth.double().cpu()).norm() / truth.double().cpu().norm().clamp(min=1e-30)
    assert error <= tolerance, f"|error| / |truth| = {error:.2e}"


def twice(function) -> tuple[Tensor, ...]:
    """The results of a function that must give the same bits again."""
    first, second = function(), function()
    first, second = ((result,) if isinstance(result, Tensor) else tuple(result) for result in (first, second))
    assert all(a.equal(b) for a, b in zip(first, second)), "two runs differ"
    return first


def logits_of(tokens: int, experts: int) -> Tensor:
    """Logits in steps, so that rounding decides nothing; two columns are equal."""
    logits_TE = torch.zeros(0, experts)
    if tokens:
        logits_TE = torch.stack([torch.randperm(experts) for _ in range(tokens)]) * (8.0 / experts) - 4
    logits_TE[:, experts // 2] = logits_TE[:, 0]
    return logits_TE.float()


def physical_ids(tokens: int, slots: int, ids: int) -> Tensor:
    return torch.randint(0, ids, (tokens, slots)).where(torch.rand(tokens, slots) > 0.1, -1)


@pytest.mark.parametrize("tokens", [0, 1, 1000, 8192])
@pytest.mark.parametrize("name", ROUTERS)
def test_router(name, tokens):
    rule, experts = ROUTERS[name]
    logits_TE, valid_T = logits_of(tokens, experts), torch.arange(tokens) % 7 != 3
    truth = router_ops._reference(logits_TE.double(), None, None, valid_T, *rule)
    dirty_TE = logits_TE.where(valid_T[:, None], torch.nan).cuda()
    got = twice(lambda: router_ops._forward(dirty_TE, None, None, valid_T.cuda(), *rule))
    for mine, theirs in zip(got[5:], truth[5:]):
        assert mine.cpu().equal(theirs)
    for mine, theirs in zip(got[:5], truth[:5]):
        assert_close(mine, theirs, 1e-5)
    replayed = router_ops._forward(dirty_TE, None, got[5], valid_T.cuda(), *rule)
    assert all(a.equal(b) for a, b in zip(replayed, got))
    grads = (torch.randn(tokens, rule.slots), torch.randn(experts), torch.tensor(0.1), torch.tensor(-0.1))
    truth = router_ops._reference_backward(*[g.double() for g in grads], logits_TE.double(), truth[5],
                                           truth[1], valid_T, *rule[1:4])
    (d_logits,) = twice(lambda: router_ops._backward(*[g.cuda() for g in grads], dirty_TE, got[5], got[1],
                                                     valid_T.cuda(), *rule[1:4]))
    assert_close(d_logits, truth, 1e-5)


@pytest.mark.parametrize("alignment", [1, 16, 128])
@pytest.mark.parametrize("tokens, slots, ids",
                         [(0, 2, 4), (1, 1, 1), (1000, 8, 128), (16384, 8, 256), (5000, 2, 3000)])
def test_route_plan(tokens, slots, ids, alignment):
    physical_TK = physical_ids(tokens, slots, ids)
    most = physical_TK.numel() + alignment * ids
    truth = plan_reference(physical_TK, ids, most, alignment)
    got = twice(lambda: torch.ops.moetrain.route_plan(physical_TK.cuda(), ids, most, alignment))
    assert all(mine.cpu().equal(theirs) for mine, theirs in zip(got, truth))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens, slots, width", [(1, 1, 8), (1000, 8, 2048), (333, 16, 520), (257, 2, 7)])
def test_rows(tokens, slots, width, dtype):
    plan = route_plan(physical_ids(tokens, slots, 16), 16, tokens * slots + 300, 16).permutation
    on_gpu = type(plan)(*[tensor.cuda() for tensor in plan])
    x_TD = torch.randn(tokens, width).to(dtype)
    (rows_RD,) = twice(lambda: permute_padded(x_TD.cuda(), on_gpu))
    assert rows_RD.cpu().equal(permute_padded(x_TD, plan))
    y_RD = torch.randn(len(plan.slots_R), width).to(dtype)
    (out_TD,) = twice(lambda: unpermute_padded(y_RD.cuda(), on_gpu))
    assert_close(out_TD, unpermute_padded(y_RD.double(), plan), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 8), (1000, 768), (333, 14336), (65, 7)])
def test_swiglu(rows, width, dtype):
    h, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    weights = torch.rand(rows)
    used = torch.tensor([rows - rows // 3], dtype=torch.int32)
    truth = swiglu_ops._reference_backward(grad.double(), h.double(), weights.double(), used)
    on_gpu = [tensor.cuda() for tensor in (grad, h, weights, used)]
    (hidden,) = twice(lambda: torch.ops.moetrain.swiglu(*on_gpu[1:]))
    got = twice(lambda: torch.ops.moetrain.swiglu_backward(*on_gpu))
    for mine, theirs in zip((hidden, *got), (truth[0], *truth)):
        assert_close(mine, theirs, TOLERANCE[dtype])
        assert not mine[used.item():].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts, rows, columns",
                         [([0, 300, 1, 0, 77], 2048, 768), ([5], 8, 136), ([0, 0], 64, 64)])
def test_weight_gradients(counts, rows, columns, dtype):
    a, b = torch.randn(sum(counts) + 3, rows).to(dtype), torch.randn(sum(counts) + 3, columns).to(dtype)
    a[sum(counts):] = torch.nan
    parts = zip(a[:sum(counts)].split(counts), b[:sum(counts)].split(counts))
    truth = torch.stack([x.double().T @ y.double() for x, y in parts]) + 1
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).cuda()

    def added() -> Tensor:
        acc = torch.ones(len(counts), rows, columns, device="cuda")
        grouped_wgrad_(a.cuda(), b.cuda(), ends, acc)
        return acc

    (acc,) = twice(added)
    assert_close(acc, truth, 1e-5)


def layer_leaves(dtype: torch.dtype, tokens: int = 512, dim: int = 256, hidden: int = 128,
                 experts: int = 16) -> list[Tensor]:
    shapes = ((tokens, dim), (tokens, experts), (experts, 2 * hidden, dim), (experts, dim, hidden))
    x, logits, gate_up, down = (torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 3 else 1)
                                for shape in shapes)
    leaves = x.to(dtype).cuda(), logits.cuda(), gate_up.cuda(), down.cuda()
    return [leaf.requires_grad_() for leaf in leaves]


def layer(x_TD: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    routed = route_tokens(logits_TE, RouterRule(4))
    plan = route_plan(routed.ids_TK, logits_TE.shape[1], routed.ids_TK.numel())
    weights_R = values_of_rows(routed.weights_TK, plan.permutation)
    return unpermute_padded(grouped_experts(x_TD, weights_R, gate_up, down, plan.permutation.counts_P,
                                            plan.permutation),
                            plan.permutation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_and_every_gradient(dtype):
    leaves = layer_leaves(dtype)
    grad = torch.randn_like(leaves[0])
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    weights_TK, ids_TK = exact[1].softmax(-1).topk(4)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    gate, up = torch.einsum("td,tkgd->tkg", exact[0], exact[2][ids_TK]).chunk(2, -1)
    truth = torch.einsum("tkf,tkdf,tk->td", torch.nn.functional.silu(gate) * up, exact[3][ids_TK], weights_TK)
    got = twice(lambda: (lambda out: [out, *torch.autograd.grad(out, leaves, grad)])(layer(*leaves)))
    for mine, theirs in zip(got, [truth, *torch.autograd.grad(truth, exact, grad.double().cpu())]):
        # several roundings to bfloat16 in a row
        assert_close(mine, theirs, 2e-5 if dtype == torch.float32 else 2e-2)


def test_a_layer_never_waits_for_the_host_and_replays_in_a_graph():
    """bfloat16: only there grouped_mm asks the host nothing, from compute capability 9.0 on."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped_mm reads its offsets on the host below compute capability 9.0")
    leaves = layer_leaves(torch.bfloat16)
    grad = torch.randn_like(leaves[0])

    def step() -> list[Tensor]:
        return [(out := layer(*leaves)), *torch.autograd.grad(out, leaves, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        assert all(a.equal(b) for a, b in zip(captured, expected))
    with torch.no_grad():                                # other numbers, other routing, the same graph
        leaves[1].copy_(torch.randn_like(leaves[1]))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert all(a.equal(b) for a, b in zip(replayed, step()))


def test_what_a_layer_keeps_is_x_h_weights_and_indices():
    leaves = layer_leaves(torch.bfloat16)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(*leaves)
    parameters = {leaf.data_ptr() for leaf in leaves[1:]}
    tokens, dim, hidden, slots = 512, 256, 128, 4
    indices = sum(t.nbytes for t in kept.values() if not t.is_floating_point())
    weights = 3 * tokens * slots * 4 + tokens * 4        # of slots and rows, and log-sum-exps
    bytes_kept = sum(t.nbytes for pointer, t in kept.items() if pointer not in parameters)
    assert bytes_kept <= 1.02 * (2 * (tokens * dim + tokens * slots * 2 * hidden) + indices + weights)


def test_more_elements_than_int32_counts():
    free, _ = torch.cuda.mem_get_info()
    tokens, width = 2**18 + 1, 2**13                     # 2^31 and a row
    if free < 3 * tokens * width * 2:
        pytest.skip(f"needs {3 * tokens * width * 2 / 2**30:.0f} GiB of GPU memory")
    x_TD = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
    plan = route_plan(torch.arange(tokens, device="cuda").flip(0)[:, None] % 7, 7, tokens).permutation
    rows_RD = permute_padded(x_TD, plan)
    assert rows_RD[-5:].equal(x_TD[plan.slots_R[-5:]]) and rows_RD[:5].equal(x_TD[plan.slots_R[:5]])
    assert unpermute_padded(rows_RD, plan)[-5:].equal(x_TD[-5:])
    del rows_RD
    hidden = torch.ops.moetrain.swiglu(x_TD, torch.ones(tokens, device="cuda"), None)
    truth = swiglu_ops._reference(x_TD[-3:].double(), torch.ones(3, device="cuda").double(), None)
    assert_close(hidden[-3:], truth, 4e-3)


def test_it_compiles():
    leaves = layer_leaves(torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*leaves), layer(*leaves), rtol=2e-2,
                               atol=2e-2)
