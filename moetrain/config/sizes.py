"""Closed forms for the parameters of a config and the bytes that one rank needs.

Integers and no torch, so the answer comes before anything starts, and at once for any size.

    state         weights, gradients, and AdamW's two moments or Muon's momentum, in float32 (float64 for that
                  dtype), sharded as the mode says; weights alone of what train.frozen names
    activations   what backward keeps of one micro-batch of this rank, and the dense matrices cast to the
                  dtype of the computation
    logits        of one micro-batch, or of train.head_chunk tokens
    tokens        what the host keeps of this rank's part of an optimizer step

Activations are those of one process on the CPU. The formulas leave out copies of experts under `fssdp`, whole
parameters that FSDP2 has gathered, rows under way between ranks, the graphs of further micro-batches that
exact balance may keep, and the allocator's reserve.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from moetrain.config.architecture import (
    attention_experts,
    attention_parameters,
    attention_top_k,
    beside_experts,
    dense_beside,
    expert_width,
    norm_tensors,
    num_attention_experts,
    rounds,
    router_paths,
)
from moetrain.config.build import NoSuchPart, declared
from moetrain.config.denoisers import special_ids
from moetrain.config.expert_sizes import expert_sizes
from moetrain.config.frozen_sizes import MAX_LAYERS, count_frozen
from moetrain.config.layer_pattern import dense_width, is_sparse, mtp_layer, per_layer, sparse_layers
from moetrain.config.router_sizes import RouterSizes, attention_router, layer_router, shared_by_routers
from moetrain.config.schema import SWIGLU, TOPK, Config, ModelConfig

# Bytes of a number in the computation; auto may be bfloat16.
_ITEM = {"auto": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Parameters(NamedTuple):
    """Numbers of parameters of the whole model, by kind."""

    matrices: int                # attention, dense layers, and what is beside the experts
    experts: int                 # routed experts
    rest: int                    # embedding, head, norms, routers
    active_experts: int          # of `experts`, those that one token visits

    @property
    def total(self) -> int:
        return self.matrices + self.experts + self.rest

    @property
    def active(self) -> int:
        return self.matrices + self.active_experts + self.rest


class Shards(NamedTuple):
    """Numbers of ranks that hold a dense parameter, or the experts of a layer, once between them."""

    dense: int
    experts: int


class LayerKind(NamedTuple):
    """Equal layers, and how many there are."""

    layers: int
    num_experts: int
    top_k: int
    dense_dim: int | None        # hidden width of its dense network; None with routed experts
    expert_dim: int
    layer: int                   # one of them


class RankMemory(NamedTuple):
    """Bytes that one rank needs, by purpose."""

    state: int
    activations: int
    logits: int
    tokens: int

    @property
    def total(self) -> int:
        return sum(self)


def ids_of(config: Config) -> int:
    """Return the ids of the data as far as the config tells, else 0: no tokenizer file is opened here."""
    data = config.data
    ids = 257 if data.kind == "text" and data.tokenizer == "bytes" else 0
    if data.kind == "synthetic" or (data.kind in ("megatron", "memmap") and data.tokenizer == "none"):
        ids = data.vocab_size
    rates = config.denoising.rates
    return ids + special_ids(rates, config.train.seq_len) if ids and rates else ids


def count_parameters(sizes: ModelConfig, vocab_size: int, expert: Mapping[str, Any] = SWIGLU,
                     router: Mapping[str, Any] = TOPK) -> Parameters:
    """Count the parameters of a model.

    Args:
        sizes: section `model` of the config.
        vocab_size: V, ids of the vocabulary.
        expert: section `expert` of the config.
        router: section `router` of the config.
    """
    width = sizes.dim
    attention = attention_parameters(sizes)
    in_rest = sum(prod(shape) for name, shape in attention.items() if len(shape) == 1)
    blocks = sizes.num_layers + sizes.mtp_layers
    matrices = blocks * (sum(map(prod, attention.values())) - in_rest) + sizes.mtp_layers * 2 * width**2
    norm = width * len(norm_tensors(sizes))
    rest = blocks * (2 * norm + in_rest) + norm + sizes.mtp_layers * 3 * norm
    rest += vocab_size * (width * (1 if sizes.tie_embeddings else 2) + sizes.head_bias)
    rest += sum(map(prod, shared_by_routers(router, sizes).values()))
    of_attention = sum(map(prod, attention_experts(sizes).values())) * blocks
    experts, active = of_attention * num_attention_experts(sizes), 0.0
    if of_attention:
        chooses = attention_router(router, sizes)
        rest += blocks * chooses.numbers
        active = of_attention * chooses.mean_experts
    for kind in layer_kinds(sizes):
        if kind.dense_dim is not None:
            matrices += kind.layers * 3 * width * kind.dense_dim
        else:
            one = expert_sizes(expert, expert_width(sizes), kind.expert_dim).numbers
            beside = beside_experts(sizes, kind.layer).values()
            matrices += kind.layers * sum(prod(shape) for shape in beside if len(shape) > 1)
            rest += kind.layers * sum(prod(shape) for shape in beside if len(shape) == 1)
            chooses = layer_router(router, sizes, kind.layer)
            rest += kind.layers * chooses.numbers * len(router_paths(sizes))
            experts += kind.layers * kind.num_experts * one
            active += kind.layers * min(chooses.mean_experts * rounds(sizes), kind.num_experts) * one
    return Parameters(matrices, experts, rest, round(active))


def layer_kinds(sizes: ModelConfig) -> list[LayerKind]:
    """Group equal layers, with those of `mtp`; where sizes are lists, every layer stands alone."""
    of_layers = sizes.num_experts, sizes.top_k, sizes.expert_dim
    lists = [entries for entries in of_layers if isinstance(entries, list)]
    if not lists:
        experts, top_k, expert_dim = (per_layer(value, 0) for value in of_layers)
        sparse = len(sparse_layers(sizes))
        ahead = sizes.mtp_layers
        kinds = [LayerKind(sizes.num_layers - sparse + (0 if sparse else ahead), experts, top_k,
                           dense_width(sizes, 0), expert_dim, 0),
                 LayerKind(sparse + (ahead if sparse else 0), experts, top_k, None, expert_dim, 0)]
        return [kind for kind in kinds if kind.layers]
    given = min(map(len, lists))
    layers = [*range(given), *[min(mtp_layer(sizes), given - 1)] * sizes.mtp_layers]
    return [LayerKind(1, per_layer(sizes.num_experts, layer), per_layer(sizes.top_k, layer),
                      None if is_sparse(sizes, layer) else dense_width(sizes, layer),
                      per_layer(sizes.expert_dim, layer), layer)
            for layer in layers]


def shards(config: Config, ranks: int) -> Shards:
    """Count the ranks that shard a dense parameter and the experts of a layer, as comm/mesh.py does."""
    parallel = config.parallel
    ep = (parallel.ep or ranks) if parallel.mode in ("ep", "ep_fsdp", "fssdp") else 1
    dense = (parallel.shard or ranks) if parallel.mode in ("fsdp", "ep_fsdp", "fssdp") else 1
    return Shards(dense, ep if parallel.mode == "fssdp" else ep * max(1, dense // ep))


def rank_memory(config: Config, vocab_size: int, ranks: int) -> RankMemory:
    """Estimate the memory of one rank in training."""
    train, cut, item = config.train, shards(config, ranks), _ITEM[config.run.dtype]
    parameters = count_parameters(config.model, vocab_size, config.expert, config.router)
    trained = count_trained(config, parameters, vocab_size)
    state = max(4, item) * (sum(_on_rank(parameters, cut)) + (3 if config.optim.name == "adamw" else 2)
                            * _on_rank(trained, cut)[0] + 3 * _on_rank(trained, cut)[1])
    tokens = train.per_forward(ranks) * train.seq_len * _draws(config)
    exchanged = cut.experts > 1 and config.parallel.mode != "fsdp"
    # Beside the logits themselves: those in float32, and their gradient.
    heads = 1 if train.head_chunk else 1 + config.model.mtp_layers
    logits = heads * min(tokens, train.head_chunk or tokens) * vocab_size * (item + 8)
    activations = tokens * kept_per_token(config, exchanged) + _casts(config, parameters, item)
    return RankMemory(state, activations, logits, _on_host(config, ranks))


def count_trained(config: Config, parameters: Parameters, vocab_size: int) -> Parameters:
    """Count the parameters that have gradients and moments: those that `train.frozen` does not name.

    Args:
        config: the config of the run.
        parameters: all of them.
        vocab_size: V, ids of the vocabulary.
    """
    if not config.train.frozen:
        return parameters
    if config.model.num_layers > MAX_LAYERS:
        return Parameters(0, 0, 0, 0)
    frozen = count_frozen(config, vocab_size)
    return parameters._replace(**{kind: getattr(parameters, kind) - numbers
                                  for kind, numbers in frozen.items()})


def _draws(config: Config) -> int:
    """Count the passes of a micro-batch that its language loss needs at once."""
    try:
        return int(declared(str(config.language_loss.get("_target_", "")), "language_loss", "draws") or 1)
    except NoSuchPart:                                       # reported where the part is checked
        return 1


def _on_rank(parameters: Parameters, cut: Shards) -> tuple[int, int]:
    """Numbers on one rank: matrices of hidden layers, and the rest."""
    return (-(-parameters.matrices // cut.dense) + -(-parameters.experts // cut.experts),
            -(-parameters.rest // cut.dense))


def kept_per_token(config: Config, exchanged: bool) -> int:
    """Count the bytes that backward keeps of one token.

    `exchanged` says that rows travel to experts on other ranks.
    """
    sizes, item, mode = config.model, _ITEM[config.run.dtype], config.train.activation_checkpointing
    kinds, seq_len = layer_kinds(sizes), config.train.seq_len
    inside = {kind: expert_sizes(config.expert, expert_width(sizes), kind.expert_dim).kept for kind in kinds}
    routers = {kind: layer_router(config.router, sizes, kind.layer) for kind in kinds}
    whole = {kind: _kept_by_block(sizes, kind, routers[kind], inside[kind], "none", item, exchanged, seq_len)
             for kind in kinds}
    # Before and after the last norm; of a module of multi-token prediction also what it combines.
    ends = item * sizes.dim * (2 + 8 * sizes.mtp_layers)
    if mode == "none":
        return ends + sum(kind.layers * kept for kind, kept in whole.items())
    kept = ends + sum(kind.layers * _kept_by_block(sizes, kind, routers[kind], inside[kind], mode, item,
                                                   exchanged, seq_len) for kind in kinds)
    return kept + max(whole.values(), default=0)  # and one block that is recomputed


def _kept_by_block(sizes: ModelConfig, kind: LayerKind, router: RouterSizes, of_row: int, mode: str,
                   item: int, exchanged: bool, seq_len: int) -> int:
    """Count the bytes that backward keeps of one token in one block, and `of_row` numbers in each expert.

    Fitted to measurements on the CPU, in bfloat16 exact to a few per cent (tests/config/test_sizes.py).
    """
    width, head = sizes.dim, sizes.head_dim or sizes.dim // sizes.num_heads
    queries, keys = sizes.num_heads * head, sizes.num_kv_heads * head
    passes = rounds(sizes) if kind.dense_dim is None else 1
    decided = 36 * passes * router.slots                             # expert ids, weights and row orders
    visited = passes * router.mean_experts
    rows, inside = round(visited * expert_width(sizes)), round(visited * of_row)
    # float32: two for each output of the router's matrices, or at least for each expert, and the choice.
    outputs = max(kind.num_experts, sum(rows for rows, _ in router.matrices))
    choices = passes * 4 * (2 * outputs + kind.num_experts)
    feed_forward = passes * dense_beside(sizes, kind.layer)
    if sizes.block == "latent":
        inside += 2 * expert_width(sizes)                        # what the experts are given and return
    if kind.dense_dim is not None:
        rows, inside, choices, feed_forward = 0, 0, 0, kind.dense_dim
    scores = slot_rows = 0
    if sizes.attention == "experts":                             # scores of every key, and x for every expert
        scores, slot_rows = sizes.num_heads * seq_len, attention_top_k(sizes) * width
        decided += 50 * attention_top_k(sizes)
    of_heads = queries + keys
    if sizes.attention == "mla":
        queries, keys = _widths_of_latents(sizes)
        of_heads = queries + keys
    if sizes.attention == "sliced":                              # x for each slice, and its rows
        slot_rows, of_heads = attention_top_k(sizes) * width, of_heads // 2
        decided += 50 * attention_top_k(sizes)
    if mode == "full":
        return item * width + decided
    if mode == "selective":
        shared = 2 * feed_forward + (width if feed_forward else 0)
        numbers = 2 * width + 2 * of_heads + rows + inside + shared + slot_rows + scores
        return item * numbers + 4 * sizes.num_heads + decided
    states = 2 + passes * (2 if item >= 4 else 4)                # of width D; norms keep what they cast
    projections = (4 if sizes.qk_norm != "none" else 3) * (queries + keys)
    projections += (sizes.clip_qkv is not None) * (queries + 2 * keys)
    projections += sizes.attention_sinks * (queries + 2 * keys)  # with a channel and a key more
    numbers = states * width + projections + inside + 4 * feed_forward + exchanged * rows
    if scores:
        numbers += scores + slot_rows + (1 if item >= 4 else 4) * queries
    if sizes.attention == "sliced":                              # and the mask of each head, in the dtype
        numbers += sizes.num_heads * seq_len + slot_rows + (2 if item >= 4 else 3) * queries
    if kind.dense_dim is None and sizes.num_shared_experts and sizes.shared_gate:
        numbers += passes * (1 if item >= 4 else 3) * width      # the output, and x as it was cast
    if kind.dense_dim is None and sizes.block == "residual" and sizes.residual_mixing == "learned":
        numbers += (2 if item >= 4 else 4) * width               # both outputs, and x as it was cast
    return item * numbers + 5 * max(item, 4) * scores + 4 * sizes.num_heads + choices + decided


def _widths_of_latents(sizes: ModelConfig) -> tuple[int, int]:
    """Numbers of queries, latents included, and of keys and values of one token in latent attention."""
    key = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
    return (sizes.num_heads * key + (sizes.q_lora_rank or 0),
            sizes.num_heads * max(key, sizes.v_head_dim) + sizes.kv_lora_rank)


def _casts(config: Config, parameters: Parameters, item: int) -> int:
    """Count the bytes of dense matrices cast to the dtype of the computation, which backward keeps.

    They are those of all blocks, or of the one that is recomputed.
    """
    if item >= 4:
        return 0
    every = config.model.num_layers + config.model.mtp_layers
    blocks = 1 if config.train.activation_checkpointing == "none" else every
    return item * parameters.matrices // blocks


def _on_host(config: Config, ranks: int) -> int:
    """Count the bytes on the host of one rank.

    They are id, target and mask of every token of its part of a step (data/batches/batch.py), and the tables
    of generated data.
    """
    train, data = config.train, config.data
    made = 8 * (data.vocab_size + data.num_domains + config.eval.windows) if data.kind == "synthetic" else 0
    return train.global_batch // ranks * train.seq_len * 17 + made
