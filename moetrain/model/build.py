"""Construction of the model from a config: built on the meta device, sharded, then allocated and initialized.

Every logical tensor is initialized from the seed and its own name, which contains layer, expert and matrix.
So every placement and every number of ranks start from the same numbers.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moetrain.comm.exchange.backends import ExchangeFactory, exchange_factory
from moetrain.comm.mesh import Mesh, lone_mesh
from moetrain.config.build import build
from moetrain.config.layer_pattern import dense_width, is_sparse, per_layer, sparse_layers
from moetrain.config.schema import Config, ModelConfig, ParallelConfig
from moetrain.errors import ConfigError
from moetrain.model.activation_checkpointing import recomputed
from moetrain.model.attention import Attention
from moetrain.model.feed_forward import FeedForward, SharedExpert
from moetrain.model.frozen import freeze, refuse_nothing_to_train, to_storage
from moetrain.model.parallelize import shard_parameters
from moetrain.model.projection import Projection
from moetrain.model.transformer import Block, Transformer
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.expert_form import SwigluExpert
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import MoELayer, sparse_layers_in
from moetrain.ops.pinned import to_device
from moetrain.parallel.state_shards import buffers, state_shards
from moetrain.plan.placement import ExpertPlacement, contiguous
from moetrain.plan.precision import choose_dtype
from moetrain.routers.context import refuse_noncausal

# A user's change of the model, in place: other layers, adapters, frozen parameters. It is called with the
# model on the meta device, before anything is sharded, and with the config of the run.
ConvertModel = Callable[[Transformer, Config], None]


def build_model(config: Config, vocab_size: int, mesh: Mesh,
                convert_model: ConvertModel | None = None) -> Transformer:
    """Build the initialized model of this rank.

    It holds the experts whose home is on this rank's `ep` position; with FSDP, a shard of every parameter.

    Args:
        config: the config of the run.
        vocab_size: V, ids of the vocabulary.
        mesh: all ranks.
        convert_model: changes the model before it is sharded, the same way on every rank.

    Returns:
        The model, on the device of the mesh.
    """
    model = meta_model(config, vocab_size, mesh, convert_model)
    shard_parameters(model, mesh)                        # before memory is allocated: only shards ever are
    model.to_empty(device=mesh.device)
    initialise(model, seed=config.run.seed, std=config.model.init_std, num_layers=config.model.num_layers)
    return model


def check_model(config: Config, convert_model: ConvertModel | None = None) -> None:
    """Raise the ConfigError of a model that cannot be built or trained, without ranks, data or memory.

    Args:
        config: the config of the run.
        convert_model: called with a model that is thrown away.
    """
    alone = replace(config, parallel=ParallelConfig())
    model = meta_model(alone, 1, lone_mesh(torch.device("cpu")), convert_model)
    refuse_nothing_to_train(model, config.train.frozen)


def meta_model(config: Config, vocab_size: int, mesh: Mesh,
               convert_model: ConvertModel | None = None) -> Transformer:
    """Build the model of this rank on the meta device: whole, converted, frozen, without numbers.

    Arguments as of `build_model`.
    """
    sizes = config.model
    placement, exchange_of = (plan_homes(sizes, mesh["ep"].size),
                              exchange_factory(config.parallel.exchange, mesh, config.run.timeout_s))
    compute = compute_dtype(config, mesh.device)
    with torch.device("meta"):
        model = Transformer(
            vocab_size=vocab_size,
            dim=sizes.dim,
            layers=[_block(config, layer, placement, mesh, exchange_of) for layer in range(sizes.num_layers)],
            head_dim=head_width(sizes),
            rope_theta=sizes.rope_theta,
            eps=sizes.norm_eps,
            tie_embeddings=sizes.tie_embeddings,
            dtype=compute,
        )
        if convert_model is not None:
            convert_model(model, config)
            _refuse_values(model)
            _check_sparse_layers(model)
    refuse_noncausal(model, allowed=config.eval.allow_noncausal)
    freeze(model, config.train.frozen)
    to_storage(model, torch.float64 if compute == torch.float64 else torch.float32)
    return model


def _refuse_values(model: Transformer) -> None:
    """Raise ConfigError where `convert_model` left a tensor with values: allocation would lose them."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            raise ConfigError(
                231, f"convert_model left {name} on the device {tensor.device}", where="convert_model",
                why="tensors get memory and start values later, so the values that it holds would be lost",
                next="create it without a device, as torch.empty(...): convert_model runs on the meta device")


def _check_sparse_layers(model: Transformer) -> None:
    """Raise ConfigError where names or sizes of `convert_model`'s sparse layers contradict each other.

    Statistics are kept by router name, and homes and copies of experts by bank name, so a name twice would
    silently join two.
    """
    layers = list(sparse_layers_in(model))
    names = [name for layer in layers for name in layer.routers]
    banks = [(name, experts) for layer in layers for name, experts in layer.banks.items()]
    fed = [name for passes in model.feeds.values() for name in passes]
    twice = sorted({name for name in names if names.count(name) > 1}
                   | {name for name, experts in banks if experts is not model.banks[name]})
    if twice:
        raise ConfigError(200, f"two routers or two banks are named {twice[0]}", where="convert_model",
                          why="statistics are kept by router name, and homes of experts by bank name",
                          next="give each router, each pass of a router, and each bank a name of its own")
    if sorted(fed) != sorted(names):
        odd = sorted(set(fed) ^ set(names)) or sorted(name for name in fed if fed.count(name) > 1)
        raise ConfigError(201, f"router {odd[0]} feeds no bank, or feeds is not a pass for each router",
                          where="convert_model", why="the gradients of copies are sent home when every pass "
                          "over a bank has run backward, and feeds says how many passes there are",
                          next="let feeds of the layer name each router once, under the bank that it chooses "
                               "from")
    for bank, passes in model.feeds.items():
        placed = model.banks[bank].dispatcher.placement.num_experts
        for name in passes:
            if model.num_experts[name] != placed:
                raise ConfigError(
                    202, f"router {name} chooses from {model.num_experts[name]} experts, and bank {bank} "
                         f"has {placed}", where="convert_model", why="a router's ids are those of its bank",
                    next="give both the same num_experts; choices that are no experts are num_choices")


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Dtype of the computation on a device. In a run it is concrete already (train/session.py)."""
    return getattr(torch, choose_dtype(config.run.dtype, device.type,
                                       computes_bfloat16=computes_bfloat16(device)))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16. On older GPUs torch emulates it, slower than float32."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def plan_homes(sizes: ModelConfig, positions: int) -> ExpertPlacement:
    """Plan the homes of experts at the start of a run: contiguous ranges over the positions of `ep`."""
    return ExpertPlacement(tuple(
        (router_name(layer), contiguous(per_layer(sizes.num_experts, layer), positions))
        for layer in sparse_layers(sizes)
    ))


def sliced_experts(parallel: ParallelConfig, mesh: Mesh) -> int:
    """Number of experts of a layer that may be sliced; 0 unless `parallel=fssdp` has several positions."""
    return parallel.max_sliced_experts if parallel.mode == "fssdp" and mesh["ep"].size > 1 else 0


def router_name(layer: int) -> str:
    """Name of a layer's router, which is the key of its statistics, loads and homes."""
    return f"layers.{layer}.moe"


def head_width(sizes: ModelConfig) -> int:
    """Width of an attention head; D / heads unless the config gives it."""
    return sizes.head_dim or sizes.dim // sizes.num_heads


@torch.no_grad()
def initialise(model: Transformer, *, seed: int, std: float, num_layers: int) -> None:
    """Initialize this rank's parameters and persistent buffers in place.

    Buffers and biases are 0, as is B of low-rank parts; norms are 1. Matrices are normal with standard
    deviation `std`, divided by sqrt(2 * num_layers) for those that write to the residual stream (`out` and
    `down`).

    Args:
        model: this rank's part of the model.
        seed: seed of the run.
        std: standard deviation.
        num_layers: blocks of the model.
    """
    for shard in buffers(model):
        shard.rows.zero_()
    projections = {path for path, module in model.named_modules() if isinstance(module, Projection)}
    for name, shape, begin, rows, _ in state_shards(model):
        module, _, tensor = name.rpartition(".")
        if tensor == "bias" or module.endswith(".low_rank") and tensor == "b":
            rows.zero_()
            continue
        # Drawn by the name that the matrix had before it was the weight of a projection.
        name = module if module in projections and tensor == "weight" else name
        if name.endswith("norm.weight"):
            rows.fill_(1.0)
            continue
        scale = std / (2 * num_layers) ** 0.5 if name.endswith((".out", ".down")) else std
        whole = normal(shape, seed=seed, name=name)
        rows.copy_(to_device((whole[begin:begin + len(rows)] if shape else whole) * scale, rows.device))


def normal(shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Draw standard normal float32 numbers that depend on seed and name alone.

    Args:
        shape: shape of the whole logical tensor, whatever part of it this rank holds.
        seed: seed of the run.
        name: name of the logical tensor.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _block(config: Config, layer: int, placement: ExpertPlacement, mesh: Mesh,
           exchange_of: ExchangeFactory) -> Block:
    sizes = config.model
    attention = Attention(
        dim=sizes.dim,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=head_width(sizes),
        qk_norm=sizes.qk_norm,
        eps=sizes.norm_eps,
    )
    if is_sparse(sizes, layer):
        feed_forward = _moe_layer(config, layer, placement, mesh, exchange_of)
    else:
        feed_forward = FeedForward(dim=sizes.dim, hidden_dim=dense_width(sizes, layer))
    return Block(attention=attention, feed_forward=feed_forward, dim=sizes.dim, eps=sizes.norm_eps,
                 recompute=recomputed(config.train.activation_checkpointing))


def _moe_layer(config: Config, layer: int, placement: ExpertPlacement, mesh: Mesh,
               exchange_of: ExchangeFactory) -> MoELayer:
    sizes, name = config.model, router_name(layer)
    homes = placement[name]
    router = build(
        config.router, "router", dim=sizes.dim, num_experts=homes.num_experts,
        top_k=per_layer(sizes.top_k, layer)
    )
    cut = (mesh["ep"].position, mesh["ep"].size) if sliced_experts(config.parallel, mesh) else None
    form = SwigluExpert(dim=sizes.dim, expert_dim=sizes.expert_dim)
    bank = ExpertBank(experts=homes.experts_of(mesh["ep"].position), form=form, cut=cut)
    # Counts stay on a device whose grouped products take them there, so that the host need not read them.
    dispatcher = TokenDispatcher(
        homes, exchange_of(name), mesh.device, exact=config.parallel.exact_combine,
        on_device=form.takes_counts_on_device(mesh.device, compute_dtype(config, mesh.device)))
    shared_dim = sizes.num_shared_experts * sizes.expert_dim
    return MoELayer(
        name=name,
        router=router,
        experts=RoutedExperts(bank, dispatcher, config.schedule.chunks),
        wrappers={"shared": SharedExpert(dim=sizes.dim, hidden_dim=shared_dim)} if shared_dim else {},
        capacity=build(config.capacity, "capacity", num_experts=homes.num_experts),
    )
