"""Forms of experts that exist for tests only: each needs something of the interface that SwiGLU does not."""

import torch.nn.functional as F
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.model.transformer import Transformer
from moetrain.moe.clamped_swiglu import ClampedSwiglu
from moetrain.moe.expert_form import ExpertForm, StackedParameters, weighted
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoEOutput, SparseLayer
from moetrain.moe.normalized_expert import NormalizedExpert
from moetrain.ops.start import Start, normal, residual_normal
from moetrain.routers.base import Router, RouterContext

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "squared_relu": lambda x: F.relu(x).square()}


class TwoMatrixExpert(ExpertForm):
    """down(activation(up x) * w), as in GShard, DeepSpeed-MoE and Nemotron."""

    SHAPES = {"up": ("F", "D"), "down": ("D", "F")}

    def __init__(self, *, dim: int, expert_dim: int, activation: str = "gelu") -> None:
        super().__init__(dim=dim, expert_dim=expert_dim)
        self.activation = ACTIVATIONS[activation]

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        hidden_RF = self.activation(experts.linear("up", x_RD))
        return experts.linear("down", weighted(hidden_RF, weights_R))


class BiasedExpert(ExpertForm):
    """(down gelu(up x + up_bias) + down_bias) * w. As w is applied before down, the bias gets its own."""

    SHAPES = {"up": ("F", "D"), "up_bias": ("F",), "down": ("D", "F"), "down_bias": ("D",)}

    def starts(self) -> dict[str, Start]:
        return {"up": normal(), "down": residual_normal(), "up_bias": normal(), "down_bias": normal()}

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        hidden_RF = F.gelu(experts.linear("up", x_RD) + experts.vectors("up_bias", x_RD))
        out_RD = experts.linear("down", weighted(hidden_RF, weights_R))
        return out_RD + weighted(experts.vectors("down_bias", x_RD), weights_R)


class TernaryExpert(TwoMatrixExpert):
    """Matrices in {-s, 0, s}, where s is the mean magnitude of the matrix (BitNet b1.58)."""

    QUANTIZED = ("up", "down")

    def quantize(self, name: str, stacked: Tensor) -> Tensor:
        scale = stacked.abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        return (stacked / scale).round().clamp(-1, 1) * scale


class QueryOutputExpert(ExpertForm):
    """Two matrices that are used apart: out(sin(query x) * w), with work between them that is no expert's."""

    SHAPES = {"query": ("F", "D"), "out": ("D", "F")}

    def queries(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return experts.linear("query", x_RD)

    def outputs(self, x_RF: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return experts.linear("out", weighted(x_RF, weights_R))

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return self.outputs(self.queries(x_RD, weights_R, experts).sin(), weights_R, experts)


class QueryOutputLayer(SparseLayer):
    """Layer that sends tokens to their experts' queries, works on these, and sends them to the outputs."""

    def __init__(self, *, name: str, router: Router, experts: RoutedExperts) -> None:
        super().__init__()
        self.name, self.router, self.experts = name, router, experts

    @property
    def routers(self) -> dict[str, Router]:
        return {f"{self.name}.{part}": self.router for part in ("queries", "outputs")}

    @property
    def banks(self) -> dict[str, RoutedExperts]:
        return {self.name: self.experts}

    @property
    def feeds(self) -> dict[str, tuple[str, ...]]:
        return {self.name: tuple(self.routers)}

    def forward(self, x_TD: Tensor, context: RouterContext, route_only: bool = False) -> MoEOutput:
        first, second = (self.route(name, x_TD, context) for name in self.routers)
        stats = dict(zip(self.routers, (first.stats, second.stats)))
        if route_only:
            return MoEOutput(x_TD, stats, None)
        query_TKF = self.experts(x_TD, first.ids_TK, first.weights_TK, part="queries", reduce=False).wait()
        hidden_NF, ids_TK = query_TKF.sin().flatten(0, 1), second.ids_TK   # each slot is a token
        out_ND = self.experts(hidden_NF, ids_TK.view(-1, 1), second.weights_TK.reshape(-1, 1),
                              part="outputs").wait()
        return MoEOutput(out_ND.view(*ids_TK.shape, -1).sum(1), stats, None)


def use_apart(model: Transformer, config: Config) -> None:
    """Use the matrices of every MoE layer apart."""
    for block in model.layers:
        moe = block.moe
        block.moe = QueryOutputLayer(name=moe.name, router=moe.router, experts=moe.experts)


def reference(form: ExpertForm, x: Tensor, weight: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Outputs [..., D] of one expert for tokens [..., D], written out.

    Args:
        form: form of the expert.
        x: tokens.
        weight: gate weights, [...].
        own: parameters of the expert, by name. Where the form quantizes them, so does this.
    """
    w = weight[..., None]
    if isinstance(form, ClampedSwiglu):
        gate, up = (x @ own["gate_up"].T + own["gate_up_bias"]).chunk(2, -1)
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        return w * ((gate / (1 + (-1.702 * gate).exp()) * (up + 1)) @ own["down"].T + own["down_bias"])
    if isinstance(form, BiasedExpert):
        return w * (F.gelu(x @ own["up"].T + own["up_bias"]) @ own["down"].T + own["down_bias"])
    if isinstance(form, TwoMatrixExpert):
        up, down = (straight_through(own[name]) if name in form.QUANTIZED else own[name]
                    for name in ("up", "down"))
        return w * (form.activation(x @ up.T) @ down.T)
    gate, up = (x @ own["gate_up"].T).chunk(2, -1)
    out = (F.silu(gate) * up) @ own["down"].T
    if isinstance(form, NormalizedExpert):
        out = own["scale"] * out / ((out ** 2).mean(-1, keepdim=True) + form.eps).sqrt()
    return w * out


def straight_through(matrix: Tensor) -> Tensor:
    """The ternary values of one matrix, with its gradient."""
    scale = matrix.detach().abs().mean().clamp(min=1e-5)
    return matrix + ((matrix / scale).round().clamp(-1, 1) * scale - matrix).detach()


class ComputedShapes(TwoMatrixExpert):
    """Form whose shapes cannot be read from source."""

    SHAPES = dict(TwoMatrixExpert.SHAPES)


class StrangeWidth(TwoMatrixExpert):
    """Form with a letter that stands for no size."""

    SHAPES = {"up": ("H", "D"), "down": ("D", "H")}
