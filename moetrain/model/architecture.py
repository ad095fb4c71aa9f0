"""Architectures of layers with experts: `model.block` names one, and this file builds it.

    plain      x += experts(norm(x)) + shared(norm(x))
    residual   a dense network of an expert's shape beside the experts, summed or mixed (residual.py)
    chain      several rounds through the same experts, each routed anew (moe/chain.py)
    latent     experts in a narrower space, between two projections (latent.py)
    sliced     experts that are slices of one dense network (sliced.py)

To add one: a function here, its name in ARCHITECTURES and in config/schema.py, its shapes in
config/architecture.py.
"""

from collections.abc import Callable
from typing import NamedTuple

from moetrain.config.architecture import expert_width, residual_width
from moetrain.config.layer_pattern import shared_width
from moetrain.config.schema import Config
from moetrain.model.feed_forward import GatedSharedExpert, SharedExpert
from moetrain.model.latent import LatentSpace
from moetrain.model.residual import MixedResidual, SummedResidual
from moetrain.model.sliced import SliceWeights
from moetrain.moe.capacity import CapacityPolicy
from moetrain.moe.chain import ChainLayer
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoELayer, SparseLayer
from moetrain.moe.wrappers import LayerWrapper
from moetrain.routers.base import Router


class LayerParts(NamedTuple):
    """What a layer with experts is made of.

    Attributes:
        config: the config of the run.
        layer: number of the layer.
        name: name of its bank, and of its router where it has one.
        make_router: makes a router of the layer, with parameters of its own at every call; `name` is that of
            the bank unless it is given.
        experts: its routed experts.
        capacity: what drops choices beyond a limit.
    """

    config: Config
    layer: int
    name: str
    make_router: Callable[..., Router]
    experts: RoutedExperts
    capacity: CapacityPolicy


def sparse_layer(parts: LayerParts) -> SparseLayer:
    """Build a layer with experts as `model.block` says."""
    return ARCHITECTURES[parts.config.model.block](parts)


def _plain(parts: LayerParts) -> SparseLayer:
    return _surrounded(parts)


def _residual(parts: LayerParts) -> SparseLayer:
    sizes = parts.config.model
    residual = MixedResidual if sizes.residual_mixing == "learned" else SummedResidual
    return _surrounded(
        parts, residual=residual(dim=sizes.dim, hidden_dim=residual_width(sizes, parts.layer)))


def _chain(parts: LayerParts) -> SparseLayer:
    sizes = parts.config.model
    routers = [parts.make_router(name=f"{parts.name}.{number}")
               for number in range(1 if sizes.chain_share_router else sizes.chain_rounds)]
    return ChainLayer(name=parts.name, routers=(routers * sizes.chain_rounds)[:sizes.chain_rounds],
                      experts=parts.experts, wrappers=_shared(parts), capacity=parts.capacity,
                      residual=sizes.chain_residual)


def _latent(parts: LayerParts) -> SparseLayer:
    sizes = parts.config.model
    return _surrounded(parts, latent=LatentSpace(dim=sizes.dim, latent_dim=expert_width(sizes)))


def _sliced(parts: LayerParts) -> SparseLayer:
    slices = parts.experts.dispatcher.placement.num_experts
    return _surrounded(parts, slices=SliceWeights(num_slices=slices))


ARCHITECTURES: dict[str, Callable[[LayerParts], SparseLayer]] = {
    "plain": _plain, "residual": _residual, "chain": _chain, "latent": _latent, "sliced": _sliced}


def _surrounded(parts: LayerParts, **wrappers: LayerWrapper) -> MoELayer:
    """Build the layer of one router and one bank, with wrappers inside the shared experts."""
    return MoELayer(name=parts.name, router=parts.make_router(), experts=parts.experts,
                    wrappers={**_shared(parts), **wrappers}, capacity=parts.capacity)


def _shared(parts: LayerParts) -> dict[str, LayerWrapper]:
    """Build the shared experts, if there are any."""
    sizes = parts.config.model
    hidden_dim = shared_width(sizes, parts.layer)
    shared = GatedSharedExpert if sizes.shared_gate else SharedExpert
    return {"shared": shared(dim=sizes.dim, hidden_dim=hidden_dim)} if hidden_dim else {}
