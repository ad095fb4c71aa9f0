"""Rules between keys of a family's `config.json` and the router's, each in both directions.

    SoftmaxRouter          softmax, with or without a sum of 1 over the chosen (Mixtral, Qwen, OLMoE)
    GroupedSoftmaxRouter   probabilities times a factor, of experts of the best groups (DeepSeek-V2)
    SigmoidRouter          sigmoid scores, a bias of the choice, groups (DeepSeek-V3, GLM-4.5)
    SparseMixer            Phi-3.5-MoE's
    Jitter                 random factors in training (Mixtral)

What a rule is: config_rules.py.
"""

from dataclasses import dataclass
from typing import Any

from moetrain.interop.huggingface.config_rules import Theirs, Values, unread
from moetrain.interop.huggingface.semantics import SIGMOID, SPARSEMIXER, TOPK


@dataclass(frozen=True)
class SoftmaxRouter:
    """A router by softmax, with or without a sum of 1 over the chosen experts.

    Args:
        normalized: whether weights are divided by their sum where the file does not say it; None: always, and
            the family has no key for it.
    """

    normalized: bool | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return () if self.normalized is None else ("norm_topk_prob",)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        said = None if self.normalized is None else theirs.get("norm_topk_prob")
        divided = self.normalized is not False if said is None else said
        return {"router._target_": TOPK, "router.weights": "renorm" if divided else "raw"}

    def write(self, ours: Values) -> dict[str, Any]:
        return {name: ours.get("router.weights") == "renorm" for name in self.keys}


@dataclass(frozen=True)
class GroupedSoftmaxRouter:
    """DeepSeek-V2's: probabilities times a factor, of experts of the best groups by their best expert."""

    keys = ("topk_method", "n_group", "topk_group", "routed_scaling_factor")

    def read(self, theirs: Theirs) -> dict[str, Any]:
        method, groups = theirs.get("topk_method") or "greedy", {}
        if method == "group_limited_greedy":
            groups = {"router.num_groups": theirs.get("n_group") or 1,
                      "router.topk_groups": theirs.get("topk_group") or 1, "router.group_score": "max"}
        elif method != "greedy":
            raise unread("topk_method", method, "it is greedy or group_limited_greedy")
        return {"router._target_": TOPK, "router.weights": "raw", **groups,
                "router.scale": float(theirs.get("routed_scaling_factor", 1.0))}

    def write(self, ours: Values) -> dict[str, Any]:
        groups = ours.get("router.num_groups")
        return {"topk_method": "group_limited_greedy" if groups else "greedy", "n_group": groups,
                "topk_group": ours.get("router.topk_groups"),
                "routed_scaling_factor": ours.get("router.scale", 1.0)}


@dataclass(frozen=True)
class SigmoidRouter:
    """DeepSeek-V3's: sigmoid scores, a bias of the choice, groups by their two best experts.

    Args:
        groups: (n_group, topk_group) of a file without them.
        scale: routed_scaling_factor of a file without it.
    """

    groups: tuple[int, int]
    scale: float
    keys = ("norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "scoring_func",
            "topk_method")

    def read(self, theirs: Theirs) -> dict[str, Any]:
        for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            if theirs.get(name) not in (None, value):
                raise unread(name, theirs[name], f"of this family it is {value}")
        divided = theirs.get("norm_topk_prob")
        number, chosen = (theirs.get(name) or default
                          for name, default in zip(("n_group", "topk_group"), self.groups))
        scale = theirs.get("routed_scaling_factor")
        return {"router._target_": SIGMOID, "router.weights": "raw" if divided is False else "renorm",
                "router.scale": float(self.scale if scale is None else scale),
                **({} if number == 1 else {"router.num_groups": number, "router.topk_groups": chosen,
                                           "router.group_score": "top2"})}

    def write(self, ours: Values) -> dict[str, Any]:
        return {"norm_topk_prob": ours.get("router.weights") == "renorm",
                "n_group": ours.get("router.num_groups", 1), "topk_group": ours.get("router.topk_groups", 1),
                "routed_scaling_factor": ours.get("router.scale", 1.0)}


@dataclass(frozen=True)
class SparseMixer:
    """Phi-3.5-MoE's router, whose reach is half of router_jitter_noise."""

    keys = ("router_jitter_noise",)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        eps = theirs.get("router_jitter_noise")
        return {"router._target_": SPARSEMIXER, "router.eps": 0.01 if eps is None else float(eps)}

    def write(self, ours: Values) -> dict[str, Any]:
        return {"router_jitter_noise": ours.get("router.eps", 0.01)}


@dataclass(frozen=True)
class Jitter:
    """Mixtral's random factors on what router and experts are given in training."""

    keys = ("router_jitter_noise",)

    def read(self, theirs: Theirs) -> dict[str, Any]:
        share = theirs.get("router_jitter_noise")
        return {"router.jitter_eps": float(share), "router.jitter_scope": "layer"} if share else {}

    def write(self, ours: Values) -> dict[str, Any]:
        jittered = ours.get("router.jitter_scope") == "layer"
        return {"router_jitter_noise": ours.get("router.jitter_eps", 0.0) if jittered else 0.0}
