"""SwiGLU with the routing weight folded in before the down projection.

    h = silu(gate) * up * w        gate, up = halves of the last dim;  w one weight a row

Folded here, what an expert returns is already weighted: combining is a plain sum, and the gradient of a weight needs no
expert output. The weight multiplies in its own dtype,
float32 or better, and the result is rounded to the rows' dtype.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(gate) * up [* weight]: [..., 2F] -> [..., F]; weights_R [R] for two-dimensional input."""
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    if weights_R is None:
        return hidden
    return (hidden * weights_R[:, None]).to(gate_up.dtype)
