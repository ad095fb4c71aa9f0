"""Keys and values of the tokens so far, so that a new token runs alone through the model.

One buffer a layer and kind, as long as the context, filled from the front. Keys are kept rotated by their positions, so
what is kept holds as long as positions do: when the window has to slide, everything is run again (generate/sample.py).

Shapes: B sequences, H key-value heads, S positions, h head width.
"""

import torch
from torch import Tensor

from moetrain.model.transformer import Transformer


class KeyValues:
    """Of one layer."""

    def __init__(self, k_BHSh: Tensor, v_BHSh: Tensor) -> None:
        """Both empty, for as many positions as they have."""
        self.k_BHSh, self.v_BHSh = k_BHSh, v_BHSh
        self.length = 0

    def extend(self, k_BHSh: Tensor, v_BHSh: Tensor) -> tuple[Tensor, Tensor]:
        """Keep these behind those that are here; views of all."""
        begin, self.length = self.length, self.length + k_BHSh.shape[2]
        assert self.length <= self.k_BHSh.shape[2], (self.length, self.k_BHSh.shape)
        self.k_BHSh[:, :, begin:self.length] = k_BHSh
        self.v_BHSh[:, :, begin:self.length] = v_BHSh
        return self.k_BHSh[:, :, :self.length], self.v_BHSh[:, :, :self.length]


class KeyValueCache:
    """Of all layers of a model, for one sequence of up to `context` tokens."""

    def __init__(self, model: Transformer, context: int) -> None:
        self.layers = []
        for block in model.layers:
            shape = (1, block.attention.num_kv_heads, context, block.attention.head_dim)
            empty = [torch.empty(shape, dtype=model.dtype, device=model.embed.device) for _ in range(2)]
            self.layers.append(KeyValues(*empty))

    @property
    def length(self) -> int:
        """Tokens that are in it."""
        return self.layers[0].length
