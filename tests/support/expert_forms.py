"""Forms of experts that exist for tests only: each needs something of the interface that SwiGLU does not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.expert_form import ExpertForm, StackedParameters, weighted
from moetrain.ops.start import Start, normal, residual_normal

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "squared_relu": lambda x: F.relu(x).square()}


class TwoMatrixExpert(ExpertForm):
    """down(activation(up x) * w), as in GShard, DeepSpeed-MoE and Nemotron."""

    SHAPES = {"up": ("F", "D"), "down": ("D", "F")}

    def starts(self) -> dict[str, Start]:
        return {"up": normal(), "down": residual_normal()}

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


class ClampedExpert(ExpertForm):
    """GPT-OSS: biases, clamps, and silu with a slope of 1.702 beside up + 1."""

    SHAPES = {"gate_up": ("2F", "D"), "gate_up_bias": ("2F",), "down": ("D", "F"), "down_bias": ("D",)}
    LIMIT, SLOPE = 0.7, 1.702

    def starts(self) -> dict[str, Start]:
        return {"gate_up": normal(), "down": residual_normal(),
                "gate_up_bias": normal(), "down_bias": normal()}

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        gate_up_RG = experts.linear("gate_up", x_RD) + experts.vectors("gate_up_bias", x_RD)
        gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
        gate_RF, up_RF = gate_RF.clamp(max=self.LIMIT), up_RF.clamp(-self.LIMIT, self.LIMIT)
        hidden_RF = gate_RF * torch.sigmoid(self.SLOPE * gate_RF) * (up_RF + 1)
        out_RD = experts.linear("down", weighted(hidden_RF, weights_R))
        return out_RD + weighted(experts.vectors("down_bias", x_RD), weights_R)


class TernaryExpert(TwoMatrixExpert):
    """Matrices in {-s, 0, s}, where s is the mean magnitude of the matrix (BitNet b1.58)."""

    QUANTIZED = ("up", "down")

    def quantize(self, name: str, stacked: Tensor) -> Tensor:
        scale = stacked.abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        return (stacked / scale).round().clamp(-1, 1) * scale


def reference(form: ExpertForm, x_D: Tensor, weight: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Output [D] of one expert for one token, written out; `own` are the parameters of the expert."""
    if isinstance(form, ClampedExpert):
        gate, up = (own["gate_up"] @ x_D + own["gate_up_bias"]).chunk(2)
        gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
        return weight * (own["down"] @ (gate / (1 + (-1.702 * gate).exp()) * (up + 1)) + own["down_bias"])
    if isinstance(form, BiasedExpert):
        return weight * (own["down"] @ F.gelu(own["up"] @ x_D + own["up_bias"]) + own["down_bias"])
    if isinstance(form, TernaryExpert):
        own = {name: straight_through(matrix) for name, matrix in own.items()}
    if isinstance(form, TwoMatrixExpert):
        return weight * (own["down"] @ form.activation(own["up"] @ x_D))
    gate, up = (own["gate_up"] @ x_D).chunk(2)
    return weight * (own["down"] @ (F.silu(gate) * up))


def straight_through(matrix: Tensor) -> Tensor:
    """The ternary values of one matrix, with its gradient."""
    scale = matrix.detach().abs().mean().clamp(min=1e-5)
    return matrix + ((matrix / scale).round().clamp(-1, 1) * scale - matrix).detach()
