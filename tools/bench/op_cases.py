"""Cases of tools/bench/ops.py: for each op and shape the candidates, their inputs, the truth and the floor.

A candidate is a function of tensors; the truth is computed in float64 on the same inputs, or for whole layers
on a sample of tokens and one expert. Floors are bytes that must move and products that must be formed
(docs/explanation/kernels.md).

Shapes: T tokens, K slots, E experts of a layer, e experts held, D model width, F expert width, R = T K rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.ops import extension, grouped_gemm, permute, route_plan, router, swiglu
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.router import RouterRule


class Shape(NamedTuple):
    """Sizes of a layer."""

    dim: int
    hidden: int
    experts: int                 # that a router knows
    held: int                    # on this rank: a balanced rank of expert parallelism receives T K rows too
    slots: int


SHAPES = {"mixtral": Shape(4096, 14336, 8, 8, 2), "qwen3": Shape(2048, 768, 128, 128, 8),
          "olmoe": Shape(2048, 1024, 64, 64, 8), "deepseek_v3_ep8": Shape(7168, 2048, 256, 32, 8)}
SMALL = {name: Shape(64, 32, shape.held, shape.held, shape.slots) for name, shape in SHAPES.items()}


class Case(NamedTuple):
    """An op with sizes: inputs, candidates, truth and floor.

    Args:
        make: returns the inputs for a seed.
        candidates: functions of the inputs, by name.
        truth: float64 results, of what `view` shows.
        bytes: bytes that must move.
        flops: products and sums that must be formed.
        tolerance: largest |error| / |truth|.
        view: part of the results that is compared.
        in_place: inputs that a candidate changes; they are renewed before a check.
    """

    make: Callable[[int], list[Tensor]]
    candidates: dict[str, Callable[..., tuple[Tensor, ...]]]
    truth: Callable[..., tuple[Tensor, ...]]
    bytes: int
    flops: int = 0
    tolerance: float = 4e-3
    view: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda results: results
    in_place: tuple[int, ...] = ()


def routed(shape: Shape, tokens: int, load_E: Tensor, seed: int, device: str,
           experts: int) -> tuple[Tensor, Tensor]:
    """Draw logits that choose experts in proportion to the loads.

    Args:
        shape: sizes of the layer.
        tokens: number of tokens T.
        load_E: load of every expert.
        seed: seed of the draw.
        device: device of the results.
        experts: number of experts E.

    Returns:
        Logits float32 [T, E], and the chosen experts int64 [T, K].
    """
    generator = torch.Generator().manual_seed(seed)
    gumbel_TE = -torch.rand(tokens, experts, generator=generator).clamp(1e-9).log().neg().log()
    logits_TE = (load_E.log() + gumbel_TE).to(device)
    return logits_TE, logits_TE.topk(shape.slots, dim=-1).indices


def randn(generator: torch.Generator, device: str, *sizes: int,
          dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(sizes, generator=generator, device=device).to(dtype)


def case_of(op: str, shape: Shape, tokens: int, load: Callable[[int], Tensor], device: str) -> Case:
    """Case of an op by its name in CASES; `load` returns the loads of so many experts."""
    return CASES[op](shape, tokens, load, device)


def ours(function: Callable, reference: Callable) -> dict[str, Callable]:
    """The kernel where there is one in use, and plain torch beside it."""
    return ({"kernel": function} if extension.absent() is None else {}) | {"plain torch": reference}


def _router(shape: Shape, tokens: int, load, device: str) -> Case:
    rule = RouterRule(shape.slots)

    def make(seed: int) -> list[Tensor]:
        return [routed(shape, tokens, load(shape.experts), seed, device, shape.experts)[0]]

    def plain(logits: Tensor):
        return router._reference(logits, None, None, None, *rule)

    moved = 4 * tokens * shape.experts + 12 * tokens * shape.slots
    return Case(make, ours(lambda logits: router._forward(logits, None, None, None, *rule), plain),
                lambda logits: plain(logits.double()), moved, tolerance=1e-5)


def _router_backward(shape: Shape, tokens: int, load, device: str) -> Case:
    rule = RouterRule(shape.slots)

    def make(seed: int) -> list[Tensor]:
        logits, ids = routed(shape, tokens, load(shape.experts), seed, device, shape.experts)
        generator = torch.Generator(device).manual_seed(seed)
        return [randn(generator, device, tokens, shape.slots, dtype=torch.float32),
                randn(generator, device, shape.experts, dtype=torch.float32),
                logits, ids, logits.logsumexp(-1)]

    def call(function: Callable) -> Callable:
        return lambda weights, slopes, logits, ids, lse: (
            function(weights, slopes, None, None, logits, ids, lse, None, *rule[1:4]),)

    return Case(make, ours(call(router._backward), call(router._reference_backward)),
                lambda weights, slopes, logits, ids, lse: call(router._reference_backward)(
                    weights.double(), slopes.double(), logits.double(), ids, lse.double()),
                8 * tokens * shape.experts + 12 * tokens * shape.slots, tolerance=1e-5)


def _route_plan(shape: Shape, tokens: int, load, device: str) -> Case:
    arguments = (shape.held, tokens * shape.slots, 1)

    def make(seed: int) -> list[Tensor]:
        return [routed(shape, tokens, load(shape.held), seed, device, shape.held)[1]]

    def plain(ids: Tensor):
        return route_plan._reference(ids, *arguments)

    return Case(make, ours(lambda ids: torch.ops.moetrain.route_plan(ids, *arguments), plain), plain,
                24 * tokens * shape.slots, tolerance=0)


def _plan(shape: Shape, tokens: int, load, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    ids = routed(shape, tokens, load(shape.held), seed, device, shape.held)[1]
    return tuple(route_plan.route_plan(ids, shape.held, tokens * shape.slots).permutation)


def _permute(shape: Shape, tokens: int, load, device: str) -> Case:
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [randn(generator, device, tokens, shape.dim), *_plan(shape, tokens, load, seed, device)[:2]]

    def plain(*inputs: Tensor):
        return (permute._gather(*inputs),)

    return Case(make, ours(lambda *inputs: (permute._permute_padded(*inputs),), plain), plain,
                2 * tokens * shape.dim * (1 + shape.slots), tolerance=0)


def _unpermute(shape: Shape, tokens: int, load, device: str) -> Case:
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        rows = randn(generator, device, tokens * shape.slots, shape.dim)
        return [rows, *_plan(shape, tokens, load, seed, device)[:2]]

    def plain(*inputs: Tensor):
        return (permute._sum(*inputs),)

    return Case(make, ours(lambda *inputs: (permute._unpermute_padded(*inputs),), plain),
                lambda rows, slots, row_of: (permute.sum_padded(rows.double(), slots, row_of),),
                2 * tokens * shape.dim * (1 + shape.slots))


def _activation_inputs(shape: Shape, tokens: int, device: str) -> Callable[[int], list[Tensor]]:
    def make(seed: int) -> list[Tensor]:
        generator, rows = torch.Generator(device).manual_seed(seed), tokens * shape.slots
        return [randn(generator, device, rows, shape.hidden),
                randn(generator, device, rows, 2 * shape.hidden),
                torch.rand(rows, generator=generator, device=device)]
    return make


def _swiglu(shape: Shape, tokens: int, load, device: str) -> Case:
    make = _activation_inputs(shape, tokens, device)

    def plain(h: Tensor, weights: Tensor):
        return (swiglu._reference(h, weights, None),)

    def kernel(*inputs: Tensor):
        return (torch.ops.moetrain.swiglu(*inputs, None),)

    return Case(lambda seed: make(seed)[1:], ours(kernel, plain),
                lambda h, weights: plain(h.double(), weights.double()),
                6 * tokens * shape.slots * shape.hidden)


def _swiglu_backward(shape: Shape, tokens: int, load, device: str) -> Case:
    def plain(grad: Tensor, h: Tensor, weights: Tensor):
        return tuple(swiglu._reference_backward(grad.clone(), h, weights, None))

    return Case(_activation_inputs(shape, tokens, device),
                ours(lambda *inputs: torch.ops.moetrain.swiglu_backward(*inputs, None), plain),
                lambda *inputs: plain(*[tensor.double() for tensor in inputs]),
                12 * tokens * shape.slots * shape.hidden)


def _wgrad(shape: Shape, tokens: int, load, device: str) -> Case:
    """Weight gradient of the down projection, into a float32 main gradient.

    The two candidates are the choice that a GPU has to make.
    """
    def make(seed: int) -> list[Tensor]:
        generator, rows = torch.Generator(device).manual_seed(seed), tokens * shape.slots
        _, _, counts = _plan(shape, tokens, load, seed, device)
        return [randn(generator, device, rows, shape.dim), randn(generator, device, rows, shape.hidden),
                counts.cumsum(0, dtype=torch.int32),
                torch.zeros(shape.held, shape.dim, shape.hidden, device=device)]

    def library(a: Tensor, b: Tensor, ends: Tensor, acc: Tensor):
        acc += F.grouped_mm(a.T, b, offs=ends)
        return (acc,)

    def kernel(a: Tensor, b: Tensor, ends: Tensor, acc: Tensor):
        grouped_gemm.grouped_wgrad_(a, b, ends, acc)
        return (acc,)

    def truth(a: Tensor, b: Tensor, ends: Tensor, acc: Tensor):
        busiest = int(ends.diff(prepend=ends.new_zeros(1)).argmax())
        begin = int(ends[busiest - 1]) if busiest else 0
        rows = slice(begin, int(ends[busiest]))
        return acc[busiest].double() + a[rows].double().T @ b[rows].double(), torch.tensor(busiest)

    candidates = ({"kernel": kernel} if extension.absent() is None else {}) | {"grouped_mm + add": library}
    return Case(make, candidates, truth, 8 * shape.held * shape.dim * shape.hidden
                + 2 * tokens * shape.slots * (shape.dim + shape.hidden),
                2 * tokens * shape.slots * shape.dim * shape.hidden, in_place=(3,))


class _Layer(nn.Module):
    """Parameters of transformers' experts, which is also the layout of Liger's function and of ours."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(hidden_size=shape.dim, moe_intermediate_size=shape.hidden,
                                num_experts=shape.held)
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)


def _layer(shape: Shape, tokens: int, load, device: str) -> Case:
    """Experts of a layer, forward and backward, with the routing given.

    Inputs: x, ids, weights, both matrices (float32, as they are trained), and the gradient of the output.
    """
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        ids = routed(shape, tokens, load(shape.held), seed, device, shape.held)[1]
        sizes = ((shape.held, 2 * shape.hidden, shape.dim), (shape.held, shape.dim, shape.hidden))
        matrices = [randn(generator, device, *size, dtype=torch.float32) / size[-1] ** 0.5 for size in sizes]
        weights = torch.rand(tokens, shape.slots, generator=generator, device=device).softmax(-1)
        return [randn(generator, device, tokens, shape.dim).requires_grad_(), ids, weights.requires_grad_(),
                *(matrix.requires_grad_() for matrix in matrices),
                randn(generator, device, tokens, shape.dim)]

    def step(forward: Callable) -> Callable:
        def run(x, ids, weights, gate_up, down, grad):
            out = forward(shape, x, ids, weights, gate_up, down)
            return (out.detach(), *torch.autograd.grad(out, (x, weights, gate_up, down), grad))
        return run

    def view(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sample = _sample(tokens, results[0].device)
        return results[0][sample], results[1][sample]

    used = "kernels" if extension.absent() is None else "plain torch"
    candidates = {f"{used}, counts on the device": step(_counts_on_device),
                  "composite grouped_mm": step(_composite), "liger": step(_liger),
                  "transformers": step(_transformers)}
    rows, matrices = tokens * shape.slots, 3 * shape.held * shape.dim * shape.hidden
    flops = 18 * rows * shape.dim * shape.hidden
    return Case(make, candidates, _layer_truth, 12 * matrices, flops, 2e-2, view)


def _counts_on_device(shape: Shape, x, ids, weights, gate_up, down) -> Tensor:
    """The package's own path, whose counts never leave the device."""
    plan = route_plan.route_plan(ids, shape.held, ids.numel()).permutation
    rows = grouped_experts(x, permute.values_of_rows(weights, plan), gate_up, down, plan.counts_P, plan)
    return permute.unpermute_padded(rows, plan)


def _composite(shape: Shape, x, ids, weights, gate_up, down) -> Tensor:
    """Sort, torch's grouped_mm, sum: what one would write by hand."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.zeros(shape.held, dtype=torch.int64, device=x.device).scatter_add(
        0, ids.flatten(), torch.ones_like(ids.flatten())).cumsum(0, dtype=torch.int32)
    h = F.grouped_mm(x[order // shape.slots], gate_up.to(x.dtype).mT, offs=ends)
    gate, up = h.chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.to(x.dtype).mT, offs=ends)
    y = y * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(y).index_copy(0, order, y).view(len(x), shape.slots, -1).sum(1)


def _liger(shape: Shape, x, ids, weights, gate_up, down) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, gate_up.to(x.dtype), down.to(x.dtype), ids.int(), weights)


def _transformers(shape: Shape, x, ids, weights, gate_up, down) -> Tensor:
    with torch.device("meta"):
        layer = _Layer(shape)
    values = {"layer.experts.gate_up_proj": gate_up.to(x.dtype), "layer.experts.down_proj": down.to(x.dtype)}
    return torch.func.functional_call(_Call(layer), values, (x, ids, weights.to(x.dtype)))


def _layer_truth(x, ids, weights, gate_up, down, grad) -> tuple[Tensor, ...]:
    """Output and gradient of x of a few tokens, in float64."""
    sample = _sample(len(x), x.device)
    x, weights = x[sample].detach().double().requires_grad_(), weights[sample].detach().double()
    outs = []
    for row, t in enumerate(sample.tolist()):
        out = 0
        for k, e in enumerate(ids[t].tolist()):
            gate, up = (gate_up[e].double() @ x[row]).chunk(2)
            out = out + weights[row, k] * (down[e].double() @ (F.silu(gate) * up))
        outs.append(out)
    out = torch.stack(outs)
    return out.detach(), torch.autograd.grad(out, x, grad[sample].double())[0]


def _sample(tokens: int, device: torch.device) -> Tensor:
    """Up to 16 tokens at equal distances."""
    return torch.arange(0, tokens, max(1, tokens // 16), device=device)[:16]


class _Call(nn.Module):
    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer.experts(*inputs)


CASES = {"router": _router, "router_backward": _router_backward, "route_plan": _route_plan,
         "permute": _permute, "unpermute": _unpermute, "swiglu": _swiglu, "swiglu_backward": _swiglu_backward,
         "wgrad": _wgrad, "layer": _layer}
