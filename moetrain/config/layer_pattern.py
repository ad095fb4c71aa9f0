"""Which layers have experts, by `model.moe_layers` and its older form, `model.first_dense_layers`.

    null              all layers but the `first_dense_layers` leading ones
    every_4           every fourth layer: 3, 7, 11, … (GShard, OpenMoE, Qwen's decoder_sparse_step)
    every_4_from_0    every fourth layer from that one on: 0, 4, 8, …
    [1,3,6]           these layers

`model.sliding_layers` says in the same way whose attention has a window; null is all layers there.

Layers are numbered from 0. Where `model.num_experts` is a list, an entry of 0 makes its layer dense, too,
unless `moe_layers` names that layer. Everything that depends on the kind of a layer asks here.
"""

import re
from collections.abc import Iterator, Sequence

from moetrain.config.schema import ModelConfig

_EVERY = re.compile(r"every_([1-9][0-9]{0,8})(?:_from_([0-9]{1,9}))?")


def is_sparse(sizes: ModelConfig, layer: int) -> bool:
    """Whether a layer has routed experts; otherwise its feed-forward network is dense."""
    return layer in sparse_layers(sizes)


def sparse_layers(sizes: ModelConfig) -> Sequence[int]:
    """List the layers with routed experts, ascending. Takes no time for any number of layers.

    A pattern that rules/model.py refuses counts as null, and numbers outside the model are left out.
    """
    given, last = sizes.moe_layers, sizes.num_layers
    if isinstance(given, list):
        return tuple(sorted({layer for layer in given if 0 <= layer < last}))
    if given is not None and (found := parse_pattern(given)) is not None:
        return range(found[1], last, found[0])
    layers = range(min(sizes.first_dense_layers, last), last)
    if isinstance(sizes.num_experts, list):              # layers beyond a list that is too short do not count
        return tuple(layer for layer, experts in enumerate(sizes.num_experts)
                     if layer in layers and experts != 0)
    return layers


def mtp_layer(sizes: ModelConfig) -> int:
    """Layer whose sizes the modules of multi-token prediction have: the last with experts, or the last."""
    sparse = sparse_layers(sizes)
    return sparse[-1] if sparse else sizes.num_layers - 1


def block_paths(sizes: ModelConfig) -> Iterator[tuple[str, int]]:
    """Iterate over all blocks in run order: the path of each in the model, and the layer of its sizes."""
    yield from ((f"layers.{layer}", layer) for layer in range(sizes.num_layers))
    yield from ((f"mtp.{module}", mtp_layer(sizes)) for module in range(sizes.mtp_layers))


def parse_pattern(text: str) -> tuple[int, int] | None:
    """Parse a pattern into its step and its first layer; None if it is malformed."""
    found = _EVERY.fullmatch(text)
    if found is None:
        return None
    return int(found[1]), int(found[1]) - 1 if found[2] is None else int(found[2])


def per_layer(value: int | list[int], layer: int) -> int:
    """Value for one layer of a size that is one number for all layers, or a list with one for each."""
    return value if isinstance(value, int) else value[layer]


def attention_window(sizes: ModelConfig, layer: int) -> int | None:
    """Keys that a query of a layer attends to at most; None where it attends to all before it."""
    return sizes.sliding_window if layer in sliding_layers(sizes) else None


def sliding_layers(sizes: ModelConfig) -> Sequence[int]:
    """List the layers whose attention has a window, ascending; a pattern that is refused names none."""
    given, last = sizes.sliding_layers, sizes.num_layers
    if sizes.sliding_window is None:
        return ()
    if isinstance(given, list):
        return tuple(sorted({layer for layer in given if 0 <= layer < last}))
    if given is None:
        return range(last)
    found = parse_pattern(given)
    return () if found is None else range(found[1], last, found[0])


def dense_width(sizes: ModelConfig, layer: int) -> int:
    """Hidden width of a dense layer; that of its `top_k` experts unless the config gives it."""
    return sizes.dense_dim or per_layer(sizes.top_k, layer) * per_layer(sizes.expert_dim, layer)


def shared_width(sizes: ModelConfig, layer: int) -> int:
    """Hidden width of the shared experts of a layer together; 0 without any."""
    if not sizes.num_shared_experts:
        return 0
    return sizes.shared_dim or sizes.num_shared_experts * per_layer(sizes.expert_dim, layer)
