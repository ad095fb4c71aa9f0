"""Construction of the model from a config: built on the meta device, sharded, then allocated and initialized.

The modules say how their tensors start (model/initialization.py).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from moetrain.comm.exchange.backends import ExchangeFactory, exchange_factory
from moetrain.comm.mesh import Mesh, lone_mesh
from moetrain.config.architecture import attention_top_k, expert_width, num_attention_experts
from moetrain.config.build import build
from moetrain.config.layer_pattern import (
    attention_window,
    block_paths,
    dense_width,
    is_sparse,
    per_layer,
    sparse_layers,
)
from moetrain.config.parallel_schema import ParallelConfig
from moetrain.config.rope_scaling import rotary_width, yarn_logit_factor
from moetrain.config.schema import Config, ModelConfig
from moetrain.errors import ConfigError
from moetrain.model.activation_checkpointing import recomputed
from moetrain.model.architecture import LayerParts, sparse_layer
from moetrain.model.attention import Attention
from moetrain.model.attention_experts import AttentionExperts, QueryOutputExpert
from moetrain.model.constant_gates import refuse_constant_gates
from moetrain.model.feed_forward import FeedForward
from moetrain.model.frozen import freeze, refuse_nothing_to_train, to_storage
from moetrain.model.initialization import declared_starts, initialize, materialize
from moetrain.model.latent_attention import LatentAttention
from moetrain.model.multi_token_prediction import MultiTokenModule
from moetrain.model.norms import NORMS
from moetrain.model.parallelize import shard_parameters
from moetrain.model.rotary import RotaryEmbedding
from moetrain.model.sliced_attention import HeadSlice, SlicedAttention
from moetrain.model.transformer import Block, Transformer
from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.expert_form import ExpertForm
from moetrain.moe.experts import RoutedExperts
from moetrain.moe.layer import SparseLayer
from moetrain.parallel.state_shards import StateShard, weights
from moetrain.plan.placement import ExpertPlacement, contiguous
from moetrain.plan.precision import choose_dtype
from moetrain.routers.base import Router
from moetrain.routers.context import refuse_noncausal

# A user's change of the model, in place: other layers, adapters, frozen parameters. It is called with the
# model on the meta device, before anything is sharded, and with the config of the run.
ConvertModel = Callable[[Transformer, Config], None]
# Vocabulary of a router that is built by itself: nobody has opened the data, and a few ids are tried.
_TRIED_IDS = 256


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
    starts = declared_starts(model)
    shard_parameters(model, mesh)                        # before memory is allocated: only shards ever are
    model.to_empty(device=mesh.device)
    initialize(model, starts, seed=config.run.seed, std=config.model.init_std,
               num_layers=config.model.num_layers)
    return model


def check_model(config: Config, convert_model: ConvertModel | None = None) -> None:
    """Raise the ConfigError of a model that cannot be built or trained, without ranks, data or memory.

    Args:
        config: the config of the run.
        convert_model: called with a model that is thrown away.
    """
    alone = replace(config, parallel=ParallelConfig())
    model = meta_model(alone, 1, lone_mesh(torch.device("cpu")), convert_model)
    declared_starts(model)
    refuse_nothing_to_train(model, config.train.frozen)
    refuse_constant_gates(model)


def weights_on_meta(config: Config, vocab_size: int,
                    convert_model: ConvertModel | None = None) -> dict[str, StateShard]:
    """List the weights of a whole model by the names of a checkpoint, without ranks or memory.

    Args:
        config: the config of a run.
        vocab_size: V, rows of embedding and head.
        convert_model: called with a model that is thrown away.
    """
    alone = replace(config, parallel=ParallelConfig())
    model = meta_model(alone, vocab_size, lone_mesh(torch.device("cpu")), convert_model)
    return {shard.name: shard for shard in weights(model)}


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
        blocks = [_block(config, vocab_size, path, layer, placement, mesh, exchange_of)
                  for path, layer in block_paths(sizes)]
        model = Transformer(
            vocab_size=vocab_size,
            dim=sizes.dim,
            layers=blocks[:sizes.num_layers],
            mtp=blocks[sizes.num_layers:],
            rotary=RotaryEmbedding(width=rotary_width(sizes), theta=sizes.rope_theta,
                                   interleaved=sizes.rope_interleaved, scaling=sizes.rope_scaling),
            eps=sizes.norm_eps,
            norm=NORMS[sizes.norm],
            tie_embeddings=sizes.tie_embeddings,
            head_bias=sizes.head_bias,
            embedding_multiplier=sizes.embedding_multiplier,
            logits_scaling=sizes.logits_scaling,
            dtype=compute,
        )
        if convert_model is not None:
            before = set(model.tied)
            convert_model(model, config)
            _tie_modules(model, before)
            _refuse_values(model)
            _check_sparse_layers(model)
    refuse_noncausal(model, allowed=config.eval.allow_noncausal)
    freeze(model, config.train.frozen)
    to_storage(model, torch.float64 if compute == torch.float64 else torch.float32)
    return model


def _tie_modules(model: Transformer, before: set[str]) -> None:
    """Let `tied` follow routers that `convert_model` has replaced; what it put there itself stays."""
    wanted = model.shared_modules()
    for name in (before & set(model.tied)) - set(wanted):
        del model.tied[name]
    model.tied.update({name: module for name, module in wanted.items() if name not in model.tied})


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
    layers = model.sparse_layers
    names = [name for layer in layers for name in layer.routers]
    banks = [(name, experts) for layer in layers for name, experts in layer.banks.items()]
    fed = [name for passes in model.feeds.values() for name in passes]
    twice = sorted({name for name in names if names.count(name) > 1}
                   | {name for name, experts in banks if experts is not model.banks[name]})
    if twice:
        raise ConfigError(200, f"two routers or two banks are named {twice[0]}", where="convert_model",
                          why="statistics are kept by router name, and homes of experts by bank name",
                          next="give each router, each pass of a router, and each bank a name of its own")
    known = list(model.banks.values())
    unknown = [path for path, module in model.named_modules()
               if isinstance(module, RoutedExperts) and not any(module is experts for experts in known)]
    if unknown:
        raise ConfigError(
            203, f"no sparse layer of a block names the bank {unknown[0]}", where="convert_model",
            why="its choices would not be counted, and its experts neither placed nor copied",
            next="name it in banks of a SparseLayer that a block holds, and its routers beside it")
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
    sparse, homes = set(sparse_layers(sizes)), []
    for path, layer in block_paths(sizes):
        if sizes.attention in ("experts", "sliced"):
            homes.append((attention_name(path), contiguous(num_attention_experts(sizes), positions)))
        if layer in sparse:
            homes.append((router_name(path), contiguous(per_layer(sizes.num_experts, layer), positions)))
    return ExpertPlacement(tuple(homes))


def sliced_experts(parallel: ParallelConfig, mesh: Mesh) -> int:
    """Number of experts of a layer that may be sliced; 0 unless `parallel=fssdp` has several positions."""
    return parallel.max_sliced_experts if parallel.mode == "fssdp" and mesh["ep"].size > 1 else 0


def router_name(path: str) -> str:
    """Name of the router of a block, which is the key of its statistics, loads and homes."""
    return f"{path}.moe"


def attention_name(path: str) -> str:
    """Name of the router and the bank of the attention experts of a block."""
    return f"{path}.attention"


def head_width(sizes: ModelConfig) -> int:
    """Width of an attention head; D / heads unless the config gives it."""
    return sizes.head_dim or sizes.dim // sizes.num_heads


def _block(config: Config, vocab_size: int, path: str, layer: int, placement: ExpertPlacement, mesh: Mesh,
           exchange_of: ExchangeFactory) -> Block:
    """Make the block at a path of the model (config/layer_pattern.py `block_paths`), with a layer's sizes."""
    sizes = config.model
    parts = partial(_layer_parts, config, vocab_size, layer, placement, mesh, exchange_of)
    attention: Attention | LatentAttention | SparseLayer
    feed_forward: FeedForward | SparseLayer
    if sizes.attention == "experts":
        own = QueryOutputExpert(dim=sizes.dim, expert_dim=sizes.num_kv_heads * head_width(sizes))
        made = parts(attention_name(path), own, attention_top_k(sizes))
        attention = AttentionExperts(name=made.name, dim=sizes.dim, num_kv_heads=sizes.num_kv_heads,
                                     head_dim=head_width(sizes), router=made.make_router(),
                                     experts=made.experts, capacity=made.capacity)
    elif sizes.attention == "sliced":
        made = parts(attention_name(path), HeadSlice(dim=sizes.dim, expert_dim=head_width(sizes)),
                     attention_top_k(sizes))
        attention = SlicedAttention(name=made.name, head_dim=head_width(sizes), router=made.make_router(),
                                    experts=made.experts, capacity=made.capacity)
    elif sizes.attention == "mla":
        attention = LatentAttention(
            dim=sizes.dim,
            num_heads=sizes.num_heads,
            q_rank=sizes.q_lora_rank,
            kv_rank=sizes.kv_lora_rank,
            nope_dim=sizes.qk_nope_head_dim,
            rope_dim=sizes.qk_rope_head_dim,
            value_dim=sizes.v_head_dim,
            eps=sizes.norm_eps,
            scale=_latent_scale(sizes),
            bias=sizes.attention_bias,
        )
    else:
        attention = Attention(
            dim=sizes.dim,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=head_width(sizes),
            eps=sizes.norm_eps,
            qk_norm=sizes.qk_norm,
            bias=sizes.attention_bias,
            clip=sizes.clip_qkv,
            sinks=sizes.attention_sinks,
            window=attention_window(sizes, layer),
            scale=sizes.attention_multiplier,
        )
    if is_sparse(sizes, layer):
        form = build(config.expert, "expert", dim=expert_width(sizes),
                     expert_dim=per_layer(sizes.expert_dim, layer))
        feed_forward = sparse_layer(parts(router_name(path), form, per_layer(sizes.top_k, layer)))
    else:
        feed_forward = FeedForward(dim=sizes.dim, hidden_dim=dense_width(sizes, layer))
    kind = Block if path.startswith("layers.") else MultiTokenModule
    return kind(attention=attention, feed_forward=feed_forward, dim=sizes.dim, eps=sizes.norm_eps,
                norm=NORMS[sizes.norm], residual_multiplier=sizes.residual_multiplier,
                recompute=recomputed(config.train.activation_checkpointing))


def _latent_scale(sizes: ModelConfig) -> float:
    """Factor of the products of queries and keys in latent attention."""
    if sizes.attention_multiplier is not None:
        return sizes.attention_multiplier
    width = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
    return width ** -0.5 * yarn_logit_factor(sizes.rope_scaling)


def router_sizes(config: Config, layer: int, vocab_size: int) -> dict[str, int | str]:
    """Sizes that a router's constructor may take (SIZES in config/build.py).

    Args:
        config: the config of the run.
        layer: number of the layer.
        vocab_size: V, rows of the embedding.
    """
    sizes = config.model
    return {"dim": sizes.dim, "num_experts": per_layer(sizes.num_experts, layer),
            "top_k": per_layer(sizes.top_k, layer), "layer": layer,
            "name": router_name(f"layers.{layer}"), "num_layers": sizes.num_layers,
            "total_steps": config.run.steps, "vocab_size": vocab_size}


def router_of(config: Config) -> Router:
    """Build the router of the first layer with experts by itself, in float64, with its start values."""
    layer = sparse_layers(config.model)[0]
    with torch.device("meta"):
        router = build(config.router, "router", **router_sizes(config, layer, _TRIED_IDS))
        router.stand_alone()
    materialize(router, seed=config.run.seed, std=config.model.init_std, num_layers=config.model.num_layers)
    return router


def _layer_parts(config: Config, vocab_size: int, layer: int, placement: ExpertPlacement, mesh: Mesh,
                 exchange_of: ExchangeFactory, name: str, form: ExpertForm, top_k: int) -> LayerParts:
    """Make what a layer with experts of this form is made of; `name` is that of its bank."""
    homes = placement[name]
    cut = (mesh["ep"].position, mesh["ep"].size) if sliced_experts(config.parallel, mesh) else None
    bank = ExpertBank(experts=homes.experts_of(mesh["ep"].position), form=form, cut=cut)
    # Counts stay on a device whose grouped products take them there, so that the host need not read them.
    dispatcher = TokenDispatcher(
        homes, exchange_of(name), mesh.device, exact=config.parallel.exact_combine,
        on_device=form.takes_counts_on_device(mesh.device, compute_dtype(config, mesh.device)))
    router = router_sizes(config, layer, vocab_size) | {
        "name": name, "num_experts": homes.num_experts, "top_k": top_k}
    return LayerParts(
        config=config,
        layer=layer,
        name=name,
        make_router=partial(build, config.router, "router", **router),
        experts=RoutedExperts(bank, dispatcher, config.schedule.chunks),
        capacity=build(config.capacity, "capacity", num_experts=homes.num_experts),
    )
