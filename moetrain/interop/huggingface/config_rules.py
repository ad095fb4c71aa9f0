"""Rules between keys of a family's `config.json` and ours, each in both directions.

    Same                one key, one value
    Fixed               a key of which only one value has a counterpart
    Implied             values that every model of a family has
    Choice              a key whose values stand for values of ours
    Repeated            a key that repeats what another says
    SharedExperts       n_shared_experts
    FurtherTokens       num_nextn_predict_layers
    Rotary              base, scaling and rotated part of a head: flat keys, or nested in rope_parameters
    SparseStep          which layers have experts: decoder_sparse_step and mlp_only_layers (Qwen)
    DenseFirst          the same by first_k_dense_replace and moe_layer_freq (DeepSeek, GLM)
    Window              sliding windows of attention: one for all layers, or layer_types

Those of routers are in router_rules.py.

A family is a list of rules (families/<name>.py). `read` turns their keys into ours (`model.dim`), `write` the
semantics of a config (semantics.py) into theirs. `write` never fails: what a family cannot say reads back as
something else, and that is how it is found (families/base.py). Where a file lacks a key, the default of the
family's class in transformers holds, which the rule states.

Newer versions of transformers nest the rotary keys in `rope_parameters`, and name the number of experts
num_local_experts everywhere. Both spellings are read; the older, which all versions read, is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from moetrain.errors import ConfigError

Theirs = Mapping[str, Any]                   # of config.json
Values = Mapping[str, Any]                   # ours, by dotted key

REQUIRED: Any = object()
_SCALED_FROM = ("yarn", "longrope", "llama3")    # types with original_max_position_embeddings


class Rule(Protocol):
    """Some keys of a `config.json`, and what they are here."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the rule reads, all spellings."""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        """Return our values by key. Raises ConfigError for a value without counterpart."""

    def write(self, ours: Values) -> dict[str, Any]:
        """Return their values by key."""


def unread(key: str, value: Any, why: str) -> ConfigError:
    """Return the error of a value in a `config.json` that has no counterpart here.

    Args:
        key: their key.
        value: its value.
        why: what would be needed.
    """
    return ConfigError(309, f"{key}={value!r} in config.json has no counterpart", where="config.json",
                       why=why, next="import a checkpoint without it; the families and what each holds are "
                                     "in docs/howto/public_models.md")


@dataclass(frozen=True)
class Same:
    """One key, whose value is ours.

    Args:
        theirs: key in `config.json`.
        ours: our key.
        default: value where the file has none, or a function of the file.
        aliases: other spellings of the key.
        kind: type of the value.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()
    kind: type = int

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs, *self.aliases)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        value = next((theirs[name] for name in self.keys if theirs.get(name) is not None), None)
        if value is None:
            value = self.default(theirs) if callable(self.default) else self.default
        if value is REQUIRED:
            raise ConfigError(310, f"config.json has no {self.theirs}", where="config.json",
                              why="the shapes of the model follow from it, and the family has no default",
                              next="restore the file; the checkpoint was published with one")
        numbers = (int, float) if self.kind is float else (self.kind,)
        if value is not None and (not isinstance(value, numbers)
                                  or (isinstance(value, bool) and self.kind is not bool)):
            raise unread(self.theirs, value, f"it has to be a value of type {self.kind.__name__}")
        return {self.ours: value}

    def write(self, ours: Values) -> dict[str, Any]:
        default = None if callable(self.default) or self.default is REQUIRED else self.default
        value = ours.get(self.ours, default)
        return {self.theirs: value[0] if isinstance(value, list) else value}    # a list reads back otherwise


@dataclass(frozen=True)
class Fixed:
    """A key of which only one value has a counterpart here, which needs no key.

    Args:
        theirs: key in `config.json`.
        value: the value, which is also that of a file without the key.
        why: what other values would need.
        ours: our values that it stands for, if they are no defaults.
    """

    theirs: str
    value: Any
    why: str
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        given = theirs.get(self.theirs)
        if given is not None and given != self.value:
            raise unread(self.theirs, given, self.why)
        return dict(self.ours)

    def write(self, ours: Values) -> dict[str, Any]:
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Implied:
    """Our values that every model of the family has; no key says them.

    Args:
        ours: values by our key.
    """

    ours: dict[str, Any]

    @property
    def keys(self) -> tuple[str, ...]:
        return ()

    def read(self, theirs: Theirs) -> dict[str, Any]:
        return dict(self.ours)

    def write(self, ours: Values) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Repeated:
    """A key that repeats what another says.

    Args:
        theirs: key in `config.json`.
        ours: our key, which another rule reads.
    """

    theirs: str
    ours: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        return {}

    def write(self, ours: Values) -> dict[str, Any]:
        return {self.theirs: ours.get(self.ours)}


@dataclass(frozen=True)
class SharedExperts:
    """Shared experts, as a number: together they are so many experts wide.

    Args:
        default: number of a file that does not say it.
    """

    default: int
    keys = ("n_shared_experts",)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        number = theirs.get("n_shared_experts", self.default)
        return {"model.num_shared_experts": number or 0}

    def write(self, ours: Values) -> dict[str, Any]:
        width = ours["model.expert_dim"]
        return {"n_shared_experts": ours["model.shared_dim"] // width if isinstance(width, int) else 0}


@dataclass(frozen=True)
class FurtherTokens:
    """Number of multi-token-prediction modules, which are trained only where `model.mtp_layers` asks for it.

    A file may say 1 and hold none, so it is not read.
    """

    keys = ("num_nextn_predict_layers", "num_mtp_layers")

    def read(self, theirs: Theirs) -> dict[str, Any]:
        return {}

    def write(self, ours: Values) -> dict[str, Any]:
        return {"num_nextn_predict_layers": ours["model.mtp_layers"]}


@dataclass(frozen=True)
class Choice:
    """A key whose values stand for values of one of ours.

    Args:
        theirs: key in `config.json`.
        ours: our key.
        values: our value by theirs.
        default: their value where the file has none.
    """

    theirs: str
    ours: str
    values: dict[Any, Any]
    default: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        given = theirs.get(self.theirs)
        given = self.default if given is None else given
        if given not in self.values:
            raise unread(self.theirs, given, f"{self.ours} has {', '.join(map(str, self.values))}")
        return {self.ours: self.values[given]}

    def write(self, ours: Values) -> dict[str, Any]:
        found = (theirs for theirs, value in self.values.items() if value == ours.get(self.ours))
        return {self.theirs: next(found, self.default)}


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding.

    Args:
        theta: base where the file has none.
        partial: part of a head that is rotated where the file has none; None: the family rotates all of it.
        scaling: of a file that says nothing of the rotary embedding.
    """

    theta: float = 10000.0
    partial: float | None = None
    scaling: Mapping[str, Any] = field(default_factory=dict)
    keys = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_parameters",
            "original_max_position_embeddings")

    def read(self, theirs: Theirs) -> dict[str, Any]:
        given = theirs.get("rope_parameters") or theirs.get("rope_scaling")
        if given is None and not {"rope_parameters", "rope_scaling"} & theirs.keys():
            given = self.scaling
        said = {name: value for name, value in (given or {}).items() if value is not None}
        if any(isinstance(value, dict) for value in said.values()):
            raise unread("rope_parameters", sorted(said), "all layers have one rotary embedding here")
        kind = said.pop("rope_type", None) or said.get("type", "default")
        said.pop("type", None)
        theta = said.pop("rope_theta", theirs.get("rope_theta") or self.theta)
        rotated = said.pop("partial_rotary_factor", theirs.get("partial_rotary_factor"))
        ours: dict[str, Any] = {"model.rope_theta": float(theta)}
        if self.partial is not None:
            ours["model.partial_rotary_factor"] = float(self.partial if rotated is None else rotated)
        elif rotated not in (None, 1, 1.0):
            raise unread("partial_rotary_factor", rotated, "this family rotates whole heads")
        if kind != "default":
            ours["model.rope_scaling"] = self._scaling({"su": "longrope"}.get(kind, kind), said, theirs)
        return ours

    def _scaling(self, kind: str, said: dict[str, Any], theirs: Theirs) -> dict[str, Any]:
        """Complete the arguments of a scaling by what stands beside them."""
        if kind not in (*_SCALED_FROM, "linear"):
            raise unread("rope_type", kind, "scalings are yarn, longrope, llama3 and linear")
        whole = theirs.get("max_position_embeddings")
        if kind in _SCALED_FROM:
            first = (theirs.get("original_max_position_embeddings")
                     or said.get("original_max_position_embeddings") or whole)
            said = {**said, "original_max_position_embeddings": first}
            if said.get("factor") is None and whole and first:
                said["factor"] = whole / first
        return {"type": kind, **said}

    def write(self, ours: Values) -> dict[str, Any]:
        scaling = dict(ours.get("model.rope_scaling") or {})
        theirs: dict[str, Any] = {"rope_theta": ours["model.rope_theta"], "rope_scaling": None}
        if scaling:
            kind = scaling.pop("type", "default")
            scaling = {name: value for name, value in scaling.items() if value is not None}
            theirs["rope_scaling"] = {"rope_type": kind, "type": kind, **scaling}
        if self.partial is not None:
            theirs["partial_rotary_factor"] = ours.get("model.partial_rotary_factor", 1.0)
        return theirs


@dataclass(frozen=True)
class SparseStep:
    """Which layers have experts, in Qwen's keys: every n-th, except those that are listed."""

    keys = ("decoder_sparse_step", "mlp_only_layers")

    def read(self, theirs: Theirs) -> dict[str, Any]:
        step, dense = theirs.get("decoder_sparse_step") or 1, theirs.get("mlp_only_layers") or []
        layers = range(theirs.get("num_hidden_layers", 0))
        sparse = [layer for layer in layers if (layer + 1) % step == 0 and layer not in dense]
        return _sparse(sparse, len(layers), step if not dense else None)

    def write(self, ours: Values) -> dict[str, Any]:
        sparse, layers = ours["model.moe_layers"], ours["model.num_layers"]
        for step in range(1, layers + 1):
            if sparse == list(range(step - 1, layers, step)):
                return {"decoder_sparse_step": step, "mlp_only_layers": []}
        return {"decoder_sparse_step": 1,
                "mlp_only_layers": [layer for layer in range(layers) if layer not in sparse]}


@dataclass(frozen=True)
class DenseFirst:
    """Which layers have experts: all, or every n-th, from a first one on."""

    default: int
    keys = ("first_k_dense_replace", "moe_layer_freq")

    def read(self, theirs: Theirs) -> dict[str, Any]:
        first, step = theirs.get("first_k_dense_replace"), theirs.get("moe_layer_freq") or 1
        first, layers = self.default if first is None else first, theirs.get("num_hidden_layers", 0)
        return _sparse([layer for layer in range(first, layers) if layer % step == 0], layers)

    def write(self, ours: Values) -> dict[str, Any]:
        return {"first_k_dense_replace": next(iter(ours["model.moe_layers"]), ours["model.num_layers"])}


def _sparse(sparse: list[int], layers: int, step: int | None = None) -> dict[str, Any]:
    """Say which layers have experts, in the shortest way."""
    if sparse == list(range(len(sparse) and sparse[0], layers)):
        return {"model.first_dense_layers": layers - len(sparse)}
    return {"model.moe_layers": f"every_{step}" if step else sparse}


@dataclass(frozen=True)
class Window:
    """Sliding windows of attention.

    Args:
        layer_types: layers with a window of a file that does not list them, as a function of the file; None:
            the family's layers are all alike.
        switch: key without which sliding_window means nothing, if there is one.
        default: width of the window where the file has none.
    """

    layer_types: Callable[[Theirs], list[int]] | None = None
    switch: str | None = None
    default: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("sliding_window", *filter(None, (self.switch,)),
                *(("layer_types", "max_window_layers") if self.layer_types else ()))

    def read(self, theirs: Theirs) -> dict[str, Any]:
        width = theirs.get("sliding_window", self.default)
        if not width or (self.switch and not theirs.get(self.switch)):
            return {}
        if width >= (theirs.get("max_position_embeddings") or width + 1):
            return {}                                    # it cuts nothing off (Phi-3.5-MoE)
        if self.layer_types is None:
            return {"model.sliding_window": width}
        listed = theirs.get("layer_types")
        layers = self.layer_types(theirs) if listed is None else [
            layer for layer, kind in enumerate(listed) if kind == "sliding_attention"]
        if not layers:
            return {}
        whole = len(layers) == theirs.get("num_hidden_layers")
        return {"model.sliding_window": width} | ({} if whole else {"model.sliding_layers": layers})

    def write(self, ours: Values) -> dict[str, Any]:
        width, sliding = ours.get("model.sliding_window"), ours.get("model.sliding_layers") or []
        theirs: dict[str, Any] = {"sliding_window": width}
        if self.switch:
            theirs[self.switch] = width is not None
        if self.layer_types:
            theirs["layer_types"] = ["sliding_attention" if layer in sliding else "full_attention"
                                     for layer in range(ours["model.num_layers"])]
        return theirs
