"""How much of a model `train.frozen` leaves to train, by formula and without torch.

For the estimate of memory, which is a lower bound: parameters that only a user's modules have are unknown
here and are left out everywhere. model/frozen.py freezes, and refuses patterns that name nothing.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from typing import NamedTuple

from moetrain.config.architecture import (
    attention_experts,
    attention_parameters,
    beside_experts,
    expert_width,
    mtp_beside,
    norm_tensors,
    num_attention_experts,
    router_paths,
)
from moetrain.config.expert_sizes import expert_shapes
from moetrain.config.layer_pattern import block_paths, dense_width, is_sparse, per_layer
from moetrain.config.router_sizes import RouterSizes, attention_router, layer_router, shared_by_routers
from moetrain.config.schema import Config

# Layers that are looked at one by one. A deeper model than anybody trains is taken to be frozen.
MAX_LAYERS = 10_000


class Named(NamedTuple):
    """Parameter of the model by its name in a checkpoint; one name stands for all experts of a layer."""

    kind: str                    # field of `Parameters`
    name: str
    numbers: int


def count_frozen(config: Config, vocab_size: int) -> dict[str, int]:
    """Count the numbers that `train.frozen` names, by field of `Parameters` (config/sizes.py)."""
    found = {"matrices": 0, "experts": 0, "rest": 0}
    for kind, name, numbers in named_parameters(config, vocab_size):
        if any(fnmatchcase(name, pattern) for pattern in config.train.frozen):
            found[kind] += numbers
    return found


def named_parameters(config: Config, vocab_size: int) -> Iterator[Named]:
    """Iterate over the parameters of a model without parts of a user's own."""
    sizes = config.model
    width = sizes.dim
    for name in ("embed",) if sizes.tie_embeddings else ("embed", "head"):
        yield Named("rest", name, vocab_size * width)
    if sizes.head_bias:
        yield Named("rest", "head_bias", vocab_size)
    for tensor in norm_tensors(sizes):
        yield Named("rest", f"norm.{tensor}", width)
    for name, shape in shared_by_routers(config.router, sizes).items():
        yield Named("rest", f"tied.{name}", prod(shape))
    for path, layer in block_paths(sizes):
        for name, shape in mtp_beside(sizes).items() if path.startswith("mtp.") else ():
            yield Named("matrices" if len(shape) > 1 else "rest", f"{path}.{name}", prod(shape))
        for norm, tensor in product(("attention_norm", "ffn_norm"), norm_tensors(sizes)):
            yield Named("rest", f"{path}.{norm}.{tensor}", width)
        for name, shape in attention_parameters(sizes).items():
            yield Named("matrices" if len(shape) > 1 else "rest", f"{path}.attention.{name}", prod(shape))
        if sizes.attention in ("experts", "sliced"):
            yield from _router(f"{path}.attention.router", attention_router(config.router, sizes))
        for name, shape in attention_experts(sizes).items():
            yield Named("experts", f"{path}.attention.experts.0.{name}",
                        num_attention_experts(sizes) * prod(shape))
        if not is_sparse(sizes, layer):
            yield from _feed_forward(f"{path}.ffn", width, dense_width(sizes, layer))
            continue
        experts = per_layer(sizes.num_experts, layer)
        for router in router_paths(sizes):
            yield from _router(f"{path}.moe.{router}", layer_router(config.router, sizes, layer))
        for name, shape in beside_experts(sizes, layer).items():
            yield Named("matrices" if len(shape) > 1 else "rest", f"{path}.moe.{name}", prod(shape))
        shapes = expert_shapes(config.expert, expert_width(sizes), per_layer(sizes.expert_dim, layer))
        for name, numbers in shapes.items():
            yield Named("experts", f"{path}.moe.experts.0.{name}", experts * numbers)


def _router(path: str, router: RouterSizes) -> Iterator[Named]:
    for name, shape in router.shapes.items():
        yield Named("rest", f"{path}.{name}", prod(shape))


def _feed_forward(path: str, width: int, hidden: int) -> Iterator[Named]:
    if hidden:
        yield Named("matrices", f"{path}.gate_up.weight", 2 * hidden * width)
        yield Named("matrices", f"{path}.down.weight", hidden * width)
