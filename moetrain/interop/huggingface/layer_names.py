"""Names of a layer's tensors in public families, and the maps from ours.

Attention and norms have the same names in all families; what is there follows from the config:

    attention_norm, ffn_norm          input_layernorm, post_attention_layernorm     .weight, .bias
    attention.qkv                     self_attn.{q,k,v}_proj: the rows one after the other
    attention.out                     self_attn.o_proj
    attention.{q,k}_norm, .sinks      self_attn.{q,k}_norm, .sinks
    attention.{q, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b}                        latent attention
                                      self_attn.{q_proj, q_a_proj, q_a_layernorm, q_b_proj,
                                      kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj}
    ffn.{gate_up, down}               mlp.{gate,up,down}_proj

Router, experts and shared experts differ. `LayerNames` says how a family, or a version of it, names them.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moetrain.config.layer_pattern import (
    dense_width,
    is_sparse,
    mtp_layer,
    per_layer,
    shared_width,
)
from moetrain.config.schema import Config, ModelConfig
from moetrain.interop.huggingface.semantics import CLAMPED_SWIGLU, SIGMOID, TOPK, head_width
from moetrain.interop.huggingface.tensor_map import (
    DEINTERLEAVED,
    TRANSPOSED,
    TRANSPOSED_DEINTERLEAVED,
    UNCHANGED,
    Shape,
    TensorMap,
    Transform,
    expert_maps,
    joined,
    renamed,
    stacked,
)

_LATENT = {"q": "q_proj", "q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj",
           "kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "out": "o_proj"}


class PerExpert(NamedTuple):
    """Names of an expert's matrices, with {} for its number."""

    gate: str
    up: str
    down: str

    def one(self) -> str:
        """Some name, to look for."""
        return self.down.format(0)

    def maps(self, ours: str, theirs: str, config: Config, layer: int) -> list[TensorMap]:
        """Map the experts of a layer. Arguments as of `layer_maps`."""
        sizes = config.model
        width, maps = per_layer(sizes.expert_dim, layer), list[TensorMap]()
        for expert in range(per_layer(sizes.num_experts, layer)):
            gate, up, down = (theirs + name.format(expert) for name in self)
            maps += expert_maps(_expert(ours, expert), gate, up, down, width)
        return maps


class Fused(NamedTuple):
    """Names of tensors that hold all experts of a layer.

    Attributes:
        gate_up: gate and up of each expert.
        down: its last matrix.
        input_major: matrices are [I, O], with gate and up columns in turn (GPT-OSS).
    """

    gate_up: str
    down: str
    input_major: bool = False

    def one(self) -> str:
        """Some name, to look for."""
        return self.down

    def maps(self, ours: str, theirs: str, config: Config, layer: int) -> list[TensorMap]:
        """Map the experts of a layer. Arguments as of `layer_maps`."""
        change = (TRANSPOSED_DEINTERLEAVED, TRANSPOSED) if self.input_major else (UNCHANGED, UNCHANGED)
        parts: list[tuple[str, str, Transform]] = [("gate_up", self.gate_up, change[0]),
                                                   ("down", self.down, change[1])]
        if config.expert.get("_target_") == CLAMPED_SWIGLU:
            parts += [("gate_up_bias", f"{self.gate_up}_bias", DEINTERLEAVED),
                      ("down_bias", f"{self.down}_bias", UNCHANGED)]
        experts = range(per_layer(config.model.num_experts, layer))
        return [stacked([_expert(ours, expert)[part] for expert in experts], theirs + name, change)
                for part, name, change in parts]


class LayerNames(NamedTuple):
    """Names of the parts of a layer with experts, below the layer.

    Attributes:
        router: matrix of the router.
        experts: those of its experts.
        shared: network of its shared experts; None: the family has none.
        shared_gate: gate of that network.
        router_bias: bias of the router's logits, or of its choice.
    """

    router: str
    experts: PerExpert | Fused
    shared: str | None = None
    shared_gate: str | None = None
    router_bias: str | None = None

    def is_used(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether a folder has tensors of experts of these names and rank."""
        rank = 3 if isinstance(self.experts, Fused) else 2
        return any(len(shape) == rank and name.endswith(f".{self.experts.one()}")
                   for name, shape in shapes.items())


# Names of recent versions of transformers.
FUSED_SWIGLU = Fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def swiglu_experts(path: str) -> PerExpert:
    """Names of experts whose matrices are gate_proj, up_proj and down_proj, below `path`."""
    return PerExpert(*(f"{path}.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")))


def module_maps(config: Config, names: LayerNames, *, ours: str, theirs: str) -> list[TensorMap]:
    """Map a module of multi-token prediction: a layer with a way in and a norm of its own.

    Its copies of embedding and head are mapped with these.

    Args:
        config: the config of the model.
        names: of the parts of a layer with experts.
        ours: beginning of the names here, `model.mtp.0.`.
        theirs: beginning of the names there, those of a layer behind the last.
    """
    own = [renamed(f"{ours}{mine}.{part}", f"{theirs}{other}.{part}")
           for mine, other in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm"))
           for part in norm_parts(config.model)]
    return [*own, renamed(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight"),
            *layer_maps(config, mtp_layer(config.model), names, ours=ours, theirs=theirs)]


def layer_maps(config: Config, layer: int, names: LayerNames, *, ours: str,
               theirs: str) -> list[TensorMap]:
    """Map the tensors of a layer.

    Args:
        config: the config of the model.
        layer: number of the layer whose sizes it has.
        names: of the parts of a layer with experts.
        ours: beginning of the names here, `model.layers.0.`.
        theirs: beginning of the names there.
    """
    sizes = config.model
    found = [renamed(f"{ours}{mine}.{part}", f"{theirs}{other}.{part}")
             for mine, other in (("attention_norm", "input_layernorm"),
                                 ("ffn_norm", "post_attention_layernorm")) for part in norm_parts(sizes)]
    found += _attention_maps(sizes, f"{ours}attention.", f"{theirs}self_attn.")
    if not is_sparse(sizes, layer):
        return found + _network(f"{ours}ffn", f"{theirs}mlp", dense_width(sizes, layer))
    found.append(renamed(f"{ours}moe.router.weight", theirs + names.router))
    if names.router_bias is not None:
        found += _router_bias(config, f"{ours}moe.router", theirs + names.router_bias)
    found += names.experts.maps(ours, theirs, config, layer)
    if names.shared is not None and shared_width(sizes, layer):
        found += _network(f"{ours}moe.shared", theirs + names.shared, shared_width(sizes, layer))
        if names.shared_gate is not None and sizes.shared_gate:
            found.append(renamed(f"{ours}moe.shared.gate.weight", theirs + names.shared_gate))
    return found


def norm_parts(sizes: ModelConfig) -> tuple[str, ...]:
    """Parameters of a norm of the residual stream."""
    return ("weight", "bias") if sizes.norm == "layer" else ("weight",)


def _attention_maps(sizes: ModelConfig, ours: str, theirs: str) -> list[TensorMap]:
    """Map the tensors of attention, plain or latent."""
    bias = sizes.attention_bias
    if sizes.attention == "mla":
        compressed = sizes.q_lora_rank is not None
        used = [name for name in _LATENT if name != "q" and (compressed or not name.startswith("q_"))]
        used += [] if compressed else ["q"]
        biased = {"q_a", "kv_a", "out"} if bias == "all" else set()
        return [renamed(f"{ours}{name}.{part}", f"{theirs}{_LATENT[name]}.{part}") for name in used
                for part in (("weight", "bias") if name in biased else ("weight",))]
    rows = [heads * head_width(sizes) for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)]
    found = [joined(f"{ours}qkv.{part}", [f"{theirs}{name}_proj.{part}" for name in "qkv"], rows)
             for part in (("weight",) if bias == "none" else ("weight", "bias"))]
    found += [renamed(f"{ours}out.{part}", f"{theirs}o_proj.{part}")
              for part in (("weight", "bias") if bias == "all" else ("weight",))]
    if sizes.qk_norm != "none":
        found += [renamed(f"{ours}{name}.weight", f"{theirs}{name}.weight") for name in ("q_norm", "k_norm")]
    if sizes.attention_sinks:
        found.append(renamed(f"{ours}sinks", f"{theirs}sinks"))
    return found


def _router_bias(config: Config, ours: str, theirs: str) -> list[TensorMap]:
    """Map the bias of a router that has one: of the choice, a buffer, or of the logits."""
    target = config.router.get("_target_")
    if target == SIGMOID:
        return [renamed(f"{ours.replace('model.', 'buffer.', 1)}.bias", theirs, float32=True)]
    biased = target == TOPK and config.router.get("logit_bias", False)
    return [renamed(f"{ours}.logit_bias", theirs)] if biased else []


def _network(ours: str, theirs: str, hidden_dim: int) -> list[TensorMap]:
    """Map a dense SwiGLU network."""
    gate_up = [f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"]
    return [joined(f"{ours}.gate_up.weight", gate_up, (hidden_dim, hidden_dim)),
            renamed(f"{ours}.down.weight", f"{theirs}.down_proj.weight")]


def _expert(ours: str, expert: int) -> dict[str, str]:
    """Names of an expert's parameters here."""
    return {part: f"{ours}moe.experts.{expert}.{part}"
            for part in ("gate_up", "down", "gate_up_bias", "down_bias")}
