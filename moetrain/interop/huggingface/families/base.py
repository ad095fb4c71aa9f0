"""A public model family: its `config.json` and the names of its tensors, in both directions.

    to_config(theirs)             sections model, router and expert of a config, as overrides of its defaults
    from_config(config, V)        a new config.json
    write_config(config, V, o)    the same where the model was imported with the config.json `o`
    refusals(config)              keys of a config that the family has no counterpart for
    tensor_maps(config, V)        the tensors, group by group, layer by layer

A family file says which rules its config.json follows (config_rules.py) and how the parts of a layer with
experts are named (layer_names.py). What a family cannot say is not listed anywhere: `refusals` writes the
config.json of a config, reads it back, and names the keys by which the two differ in what the model computes
(semantics.py).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from moetrain.config.layer_pattern import dense_width
from moetrain.config.schema import SWIGLU, Config, ModelConfig
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.interop.huggingface.config_rules import Choice, Fixed, Implied, Repeated, Rule, Same, unread
from moetrain.interop.huggingface.layer_names import LayerNames, layer_maps, module_maps, norm_parts
from moetrain.interop.huggingface.semantics import of_training, semantics
from moetrain.interop.huggingface.tensor_map import Shape, TensorMap, copied, renamed

_CAPACITY = "moetrain.moe.capacity.CapacityPolicy"           # the one that drops nothing
# Keys of a config.json that are no family's own: what made the file, and which ids have a meaning.
COMMON = ("architectures", "model_type", "vocab_size", "max_position_embeddings")
# The key that a user sets, where that of the semantics follows from several.
_SET_BY = {"model.shared_dim": "model.num_shared_experts"}
# Keys that choose a part, which has keys of its own.
_KINDS = ("model.attention", "model.block", "router._target_", "expert._target_")
_WITH_THE_KIND = ("model.attention_multiplier",)             # its default depends on it
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FREQUENCIES = re.compile(r"model\..*rotary_emb\.inv_freq")  # of old files; they follow from the config


def sizes_of(*, experts: str, expert_dim: str, dense_dim: str | None = None,
             top_k: tuple[str, ...] = ()) -> list[Rule]:
    """Rules that all families share, with the keys of the experts.

    Args:
        experts: their key of the number of experts.
        expert_dim: their key of an expert's width.
        dense_dim: their key of the width of dense layers, if they have any.
        top_k: other spellings of num_experts_per_tok.
    """
    spellings = ("num_local_experts", "num_experts", "n_routed_experts")
    rules: list[Rule] = [
        Same("hidden_size", "model.dim"),
        Same("num_hidden_layers", "model.num_layers"),
        Same("num_attention_heads", "model.num_heads"),
        Same(experts, "model.num_experts", aliases=tuple(set(spellings) - {experts})),
        Same("num_experts_per_tok", "model.top_k", aliases=top_k),
        Same(expert_dim, "model.expert_dim"),
        Same("tie_word_embeddings", "model.tie_embeddings", default=False, kind=bool),
        Same("initializer_range", "model.init_std", default=0.02, kind=float),
        Fixed("hidden_act", "silu", "experts and dense networks are SwiGLU"),
        Fixed("attention_dropout", 0.0, "nothing is dropped at random here"),
    ]
    return rules + ([Same(dense_dim, "model.dense_dim")] if dense_dim else [])


def kv_heads() -> Rule:
    """Rule of the key-value heads: as many as query heads where a file does not say it."""
    return Same("num_key_value_heads", "model.num_kv_heads", default=lambda file: file["num_attention_heads"])


def head_dim(default: int | None = None) -> Rule:
    """Rule of the width of a head in families that have a key for it; by default D over heads."""
    return Same("head_dim", "model.head_dim", default=lambda file: default or
                file["hidden_size"] // file["num_attention_heads"])


def latent_attention() -> list[Rule]:
    """Rules of DeepSeek's multi-head latent attention."""
    return [
        Implied({"model.attention": "mla"}),
        Repeated("num_key_value_heads", "model.num_heads"),
        # null is a value: queries are not compressed.
        Same("q_lora_rank", "model.q_lora_rank",
             default=lambda file: None if "q_lora_rank" in file else 1536),
        *(Same(name, f"model.{name}", default=default) for name, default in (
            ("kv_lora_rank", 512), ("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64), ("v_head_dim", 128))),
        Choice("attention_bias", "model.attention_bias", {False: "none", True: "all"}, False),
    ]


class Family:
    """A family of public models.

    Attributes:
        model_type: its name in `config.json`.
        architecture: its class in transformers.
        rules: of its `config.json`.
        spellings: names of a layer's parts, by the name of the spelling; the first is written.
        predicts_further: whether its files may hold multi-token-prediction modules, as layers behind the
            last. Without `model.mtp_layers` they are kept as they are, for the way back.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    rules: ClassVar[list[Rule]]
    spellings: ClassVar[dict[str, LayerNames]]
    predicts_further: ClassVar[bool] = False

    @property
    def known_keys(self) -> frozenset[str]:
        """Keys of a `config.json` that mean something here; others are kept as they are."""
        return frozenset(COMMON) | {key for rule in self.rules for key in rule.keys}

    def to_config(self, theirs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the sections model, router and expert of the config, without keys that have their default.

        Raises ConfigErrors where the file says what has no counterpart, or lacks a size.
        """
        ours: dict[str, Any] = {"expert._target_": SWIGLU["_target_"], "model.vocab_size":
                                theirs.get("vocab_size")}
        errors, odd = list[ConfigError](), list[Rule]()
        for rule in self.rules:
            try:
                ours |= rule.read(theirs)
            except ConfigError as error:
                errors.append(error)
            except (ArithmeticError, LookupError, TypeError, ValueError):
                odd.append(rule)
        if odd and not errors:
            errors = [unread(rule.keys[0], theirs.get(rule.keys[0]), "it has another form in this family")
                      for rule in odd]
        if errors:
            raise ConfigErrors(errors)
        sections: dict[str, dict[str, Any]] = {"model": {}, "router": {}, "expert": {}}
        for key, value in ours.items():
            section, _, name = key.partition(".")
            sections[section][name] = value
        defaults = {field.name: getattr(ModelConfig(), field.name) for field in fields(ModelConfig)}
        sections["model"] = {name: value for name, value in sections["model"].items()
                             if value != defaults[name]}
        return sections

    def bare_config(self, theirs: Mapping[str, Any]) -> Config:
        """Return the config of these sections, everything else at its default."""
        sections = self.to_config(theirs)
        return Config(model=ModelConfig(**sections["model"]), router=sections["router"],
                      expert=sections["expert"])

    def from_config(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return the `config.json` of a config that has not been imported.

        Args:
            config: the config of a run.
            vocab_size: V, rows of the embedding.
        """
        ours = {**of_training(config), **semantics(config), "model.init_std": config.model.init_std}
        if ours["model.dense_dim"] is None:                  # without dense layers, any width is right
            ours["model.dense_dim"] = dense_width(config.model, 0)
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type,
                                  "vocab_size": vocab_size,
                                  "max_position_embeddings": _positions(config)}
        for rule in self.rules:
            theirs |= rule.write(ours)
        return theirs

    def write_config(self, config: Config, vocab_size: int,
                     original: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the `config.json` to write.

        Args:
            config: the config of a run.
            vocab_size: V, rows of the embedding.
            original: that of the folder that the model was imported from. What it says stays, spellings and
                unknown keys included, but for the keys that are no longer true. That of another family is
                not read.
        """
        after = self.from_config(config, vocab_size)
        if original is None or original.get("model_type") != self.model_type:
            return after
        before = self.from_config(self.bare_config(original), original["vocab_size"])
        after["max_position_embeddings"] = before["max_position_embeddings"]
        written = dict(original)
        for keys in [(name,) for name in COMMON] + [rule.keys for rule in self.rules]:
            said = {name: after[name] for name in keys if name in after}
            if any(before.get(name) != value for name, value in said.items()):
                written = {name: value for name, value in written.items() if name not in keys} | said
        return written

    def refusals(self, config: Config) -> list[tuple[str, str]]:
        """List the keys of a config that stand in the way of an exact counterpart, each with the reason."""
        found = []
        if config.capacity.get("_target_", _CAPACITY) != _CAPACITY:
            found.append(("capacity", "public models are dropless: which tokens a capacity drops depends on "
                                      "the other tokens of a pass"))
        if config.denoising.rates:
            found.append(("denoising.rates", "the model was trained on sequences with modes and sentinels, "
                                             "which tokenizers of public models do not have"))
        ours = semantics(config)
        try:
            back = semantics(self.bare_config(self.from_config(config, 1)))
        except ConfigError as error:
            return [*found, ("model", f"{self.model_type} cannot say it: {error}")]
        kinds = [key for key in _KINDS if ours.get(key) != back.get(key)]
        for key in sorted(ours.keys() | back.keys()):
            said_elsewhere = self.predicts_further and key == "model.mtp_layers"
            # Options of another kind of attention, block, router or experts: the kind says it all.
            follows = bool(kinds) and (key not in ours or key not in back or key in _WITH_THE_KIND)
            if ours.get(key) != back.get(key) and not said_elsewhere and not follows:
                found.append((_SET_BY.get(key, key), f"{self.model_type} has {_shown(back, key)}, "
                                   f"and the model {_shown(ours, key)}"))
        return found

    def spelling(self, shapes: Mapping[str, Shape]) -> str:
        """Find the spelling of a folder by the names of its tensors and their ranks.

        Args:
            shapes: shapes by name.
        """
        for name, layer in self.spellings.items():
            if layer.is_used(shapes):
                return name
        return next(iter(self.spellings))

    def tensor_maps(self, config: Config, vocab_size: int,
                    spelling: str | None = None) -> Iterator[list[TensorMap]]:
        """Yield the groups of tensors: of the embedding, of each layer, then of norm and head.

        Args:
            config: the config of the model.
            vocab_size: V, rows of the embedding.
            spelling: a key of `spellings`; None: the first.
        """
        sizes = config.model
        names = self.spellings[spelling or next(iter(self.spellings))]
        further = [f"model.layers.{sizes.num_layers + module}." for module in range(sizes.mtp_layers)]
        yield [copied("model.embed", [f"{path}embed_tokens.weight" for path in ("model.", *further)])]
        for layer in range(sizes.num_layers):
            yield layer_maps(config, layer, names, ours=f"model.layers.{layer}.",
                             theirs=f"model.layers.{layer}.")
        for module, theirs in enumerate(further):
            yield module_maps(config, names, ours=f"model.mtp.{module}.", theirs=theirs)
        last = [renamed(f"model.norm.{part}", f"model.norm.{part}") for part in norm_parts(sizes)]
        if not sizes.tie_embeddings:
            last.append(copied("model.head", ["lm_head.weight", *(f"{path}shared_head.head.weight"
                                                                  for path in further)]))
        if sizes.head_bias:
            last.append(renamed("model.head_bias", "lm_head.bias"))
        yield last

    def duplicates(self, config: Config) -> dict[str, str]:
        """Names of tensors that a folder may have although they equal another, and the names of these."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.model.tie_embeddings else {}

    def preserved(self, name: str, config: Config) -> bool:
        """Whether a tensor of a folder that is not mapped is kept as it is, for the way back.

        Args:
            name: name in the folder.
            config: the config of the model.
        """
        found = _LAYER.match(name)
        layers = config.model.num_layers + config.model.mtp_layers
        beyond = self.predicts_further and found is not None and int(found[1]) >= layers
        return beyond or _FREQUENCIES.fullmatch(name) is not None


def _positions(config: Config) -> int:
    """Positions that the model was trained on, as far as the config says it; more than a window reaches."""
    scaling: Mapping[str, Any] = config.model.rope_scaling
    first, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    positions = round(first * factor) if first and factor else config.train.seq_len
    return max(positions, (config.model.sliding_window or 0) + 1)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return f"{key.partition('.')[2]}={values[key]}" if key in values else "none"
