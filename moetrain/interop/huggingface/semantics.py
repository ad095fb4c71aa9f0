"""What a model computes, as a config says it: one value for each key that the logits depend on.

Two configs with equal semantics are the same function of weights and tokens. Keys of how a model is trained
are left out (initial weights, noise of routers, steps of their biases), keys that do nothing beside others
too (`chain_rounds` in a plain block), and spellings that mean the same are one (a list of equal sizes and the
size, `moe_layers=every_1` and null).

    semantics(config)["model.head_dim"]     16

Everything else of section `model`, of `router` and of `expert` is a part of it: a key that is added to the
schema counts from the first day on, and a family that does not know it refuses what differs from its default.
"""

from dataclasses import fields
from typing import Any

from moetrain.config.build import NoSuchPart, arguments
from moetrain.config.layer_pattern import (
    dense_width,
    per_layer,
    shared_width,
    sliding_layers,
    sparse_layers,
)
from moetrain.config.rope_scaling import with_defaults
from moetrain.config.schema import Config, ModelConfig

TOPK = "moetrain.routers.topk.TopKRouter"
SIGMOID = "moetrain.routers.sigmoid.SigmoidRouter"
SPARSEMIXER = "moetrain.routers.sparsemixer.SparseMixerRouter"
SWIGLU = "moetrain.moe.expert_form.SwigluExpert"
CLAMPED_SWIGLU = "moetrain.moe.clamped_swiglu.ClampedSwiglu"

# Of the weights at the start, of the loss, and of the vocabulary, which has a number of its own.
_NOT_OF_THE_FUNCTION = {"init_std", "mtp_weight", "vocab_size"}
# Keys that count only where another has a value: {key: (other key, value)}.
_ONLY_WITH = {
    "residual_mixing": ("block", "residual"), "chain_rounds": ("block", "chain"),
    "chain_residual": ("block", "chain"), "chain_share_router": ("block", "chain"),
    "latent_dim": ("block", "latent"), "num_attention_experts": ("attention", "experts"),
    "top_k_heads": ("attention", "sliced"), "q_lora_rank": ("attention", "mla"),
    "kv_lora_rank": ("attention", "mla"), "qk_nope_head_dim": ("attention", "mla"),
    "qk_rope_head_dim": ("attention", "mla"), "v_head_dim": ("attention", "mla"),
}
# Of latent attention these are not read: its own keys say them.
_NOT_OF_MLA = {"head_dim", "num_kv_heads", "qk_norm"}
# Arguments of routers that act in training alone, without a parameter of their own.
_OF_TRAINING = {
    TOPK: {"jitter_eps", "jitter_scope", "second_expert", "quantile_rate"},
    SIGMOID: {"balance", "quantile_rate", "update_rate", "counts", "center"},
}


def semantics(config: Config) -> dict[str, Any]:
    """Return the values that the logits depend on, by key (`model.dim`, `router.weights`)."""
    return {**_of_model(config.model), **_of_router(config), **_of_part("expert", config.expert)}


def of_training(config: Config) -> dict[str, Any]:
    """Return what the router's config says of training alone, by key."""
    names = _OF_TRAINING.get(str(config.router.get("_target_")), set())
    return {f"router.{name}": value for name, value in config.router.items() if name in names}


def _of_model(sizes: ModelConfig) -> dict[str, Any]:
    values = {field.name: getattr(sizes, field.name) for field in fields(sizes)
              if field.name not in _NOT_OF_THE_FUNCTION}
    for name, (other, value) in _ONLY_WITH.items():
        if values.get(other) != value:
            values.pop(name, None)
    sparse = list(sparse_layers(sizes))
    dense = [layer for layer in range(sizes.num_layers) if layer not in sparse]
    values["head_dim"] = head_width(sizes)
    for name in ("num_experts", "top_k", "expert_dim"):
        values[name] = _alike([per_layer(values[name], layer) for layer in sparse])
    values["moe_layers"] = sparse
    values["dense_dim"] = _alike([dense_width(sizes, layer) for layer in dense])
    values["shared_dim"] = _alike([shared_width(sizes, layer) for layer in sparse]) or 0
    for name in ("first_dense_layers", "num_shared_experts"):        # said by the keys above
        del values[name]
    if values["attention"] == "mla":
        values = {name: value for name, value in values.items() if name not in _NOT_OF_MLA}
    values["sliding_layers"] = list(sliding_layers(sizes))
    if values["rope_scaling"]:
        values["rope_scaling"] = with_defaults(values["rope_scaling"])
    if values.get("attention_multiplier", 0) is None:
        values["attention_multiplier"] = key_width(sizes) ** -0.5
    return {f"model.{name}": _plain(value) for name, value in values.items()}


def head_width(sizes: ModelConfig) -> int:
    """Width of an attention head; D / heads unless the config gives it."""
    return sizes.head_dim or sizes.dim // sizes.num_heads


def key_width(sizes: Any) -> int:
    """Width of the queries and keys of a head."""
    mla = sizes.attention == "mla"
    return sizes.qk_nope_head_dim + sizes.qk_rope_head_dim if mla else head_width(sizes)


def _of_router(config: Config) -> dict[str, Any]:
    values = _of_part("router", config.router)
    target = values["router._target_"]
    for name in _OF_TRAINING.get(target, ()):
        values.pop(f"router.{name}", None)
    if values.get("router.weights") == "softmax_of_topk":            # the same function (routers/topk.py)
        values["router.weights"] = "renorm"
    if values.get("router.noise") in ("gumbel", "vmoe"):             # noise=normal has a matrix of its own
        values["router.noise"] = "none"
    groups = values.get("router.num_groups", 1)
    if groups == 1 or values.get("router.topk_groups") == groups:
        for name in ("num_groups", "topk_groups", "group_score"):
            values.pop(f"router.{name}", None)
    return values


def _of_part(section: str, node: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a part with their defaults, by key; what is no part keeps what it says."""
    target = str(node.get("_target_", ""))
    try:
        accepted = {name: key.default for name, key in arguments(target, section).items()}
    except NoSuchPart:
        accepted = {}
    sizes = ("dim", "num_experts", "top_k", "num_layers", "total_steps", "layer", "name", "expert_dim",
             "vocab_size")
    values = {name: value for name, value in {**accepted, **node}.items() if name not in sizes}
    return {f"{section}.{name}": _plain(value) for name, value in values.items()}


def _alike(values: list[int]) -> int | list[int] | None:
    """Reduce a list of equal entries to one; an empty one to None. Others stay."""
    return values if len(set(values)) > 1 else next(iter(values), None)


def _plain(value: Any) -> Any:
    """Value for a comparison: tuples are lists, and so is a range."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple, range)) else value
