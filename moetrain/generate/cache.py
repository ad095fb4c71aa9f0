"""Key-value cache, with which a new token runs alone through the model.

Every layer has one buffer for keys and one for values, as long as the context and filled from the front;
latent attention keeps latents and rotated channels in their place (model/latent_attention.py). Keys are
stored with their rotary positions applied, so they are valid as long as the positions are: when the window
slides, the whole window runs again (generate/sample.py).

Shapes: B sequences, H key-value heads, S positions, h head width.
"""

import torch
from torch import Tensor

from moetrain.model.transformer import Transformer


class LayerKeyValues:
    """Keys and values of one layer.

    Args:
        k_BHSh: empty buffer of keys; its S is the number of positions that fit.
        v_BHSh: empty buffer of values.
    """

    def __init__(self, k_BHSh: Tensor, v_BHSh: Tensor) -> None:
        self.k_BHSh, self.v_BHSh = k_BHSh, v_BHSh
        self.length = 0

    def extend(self, k_BHSh: Tensor, v_BHSh: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns views of all that are stored."""
        begin, self.length = self.length, self.length + k_BHSh.shape[2]
        assert self.length <= self.k_BHSh.shape[2], (self.length, self.k_BHSh.shape)
        self.k_BHSh[:, :, begin:self.length] = k_BHSh
        self.v_BHSh[:, :, begin:self.length] = v_BHSh
        return self.k_BHSh[:, :, :self.length], self.v_BHSh[:, :, :self.length]


class KeyValueCache:
    """Keys and values of all layers of a model, for one sequence of up to `context` tokens."""

    def __init__(self, model: Transformer, context: int) -> None:
        self.layers = []
        for block in model.layers:
            empty = [torch.empty((1, heads, context, width), dtype=model.dtype, device=model.embed.device)
                     for heads, width in block.attention.cached]
            self.layers.append(LayerKeyValues(*empty))

    @property
    def length(self) -> int:
        """Number of tokens stored."""
        return self.layers[0].length
