"""Every router of conf/router/ with random weights, and every router and architecture in a run."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.model.initialization import materialize
from moetrain.routers.base import Router, RouterContext

E, K, D = 8, 3, 5
LIMITED = ["router.num_groups=4", "router.topk_groups=2"]
MOE_PLUS_PLUS = ["router.num_null=1", "router.num_copy=1", "router.num_constant=2", "router.map_logits=true",
                 "loss=[z,hetero_lbl]"]
# Overrides that a router needs, by its option.
NEEDS = {"sparsemixer": ["model.top_k=2"], "expert_choice": ["eval.allow_noncausal=true"]}
# Overrides with which a router is tried besides its defaults, by its option.
QUANTILE = ["router.balance=quantile"]
VARIANTS = {
    "topk": [LIMITED, QUANTILE,
             ["router.noise=normal", "router.jitter_eps=0.1", "router.logit_bias=true",
              "loss=[z,importance,load]"],
             ["model.top_k=2", "router.noise=vmoe", "router.second_expert=random", "loss=[z,first_choice]"],
             ["model.top_k=2", "router.noise=gumbel", "router.second_expert=sample", "router.jitter_eps=0.1",
              "router.jitter_scope=layer"]],
    "sigmoid": [LIMITED, QUANTILE],
    "top_p": [["router.k_min=2", "router.k_max=3", "loss=[z,entropy]"]],
    "dtop_p": [["router.target_k=1.25"]],
    "null_expert": [["router.renorm=none", "router.num_null=2", "loss=[z,null_lbl]"], MOE_PLUS_PLUS],
    "relu": [["router.target_k=1.5", "router.lambda0=0.01", "loss=[z,l1_lb]"]],
    "mlp": [["router.kind=gmm"], ["router.dropout=0.25", "router.sample_topk=1"]],
    "stochastic": [["model.top_k=1", "language_loss=consistency"]],
    "domain": [["router.experts=[[0,1,2,3],[4,5,6,7],[0,2,4,6],[1,3,5,7]]"]]}
# Sizes of their own that routers have by themselves, for finite differences, by option.
SMALL = {"recurrent": ["router.state_dim=2"], "mlp": ["router.hidden=3"]}
EVERY = [(option, overrides) for option in group_options()["router"]
         for overrides in ([], *VARIANTS.get(option, []))]


def chosen(option: str, overrides: list[str]) -> list[str]:
    """Overrides of a run with this router."""
    return [f"router={option}", *NEEDS.get(option, []), *overrides]


def _name(option: str, overrides: list[str]) -> str:
    return "-".join([option, *(override.partition(".")[2] or override for override in overrides)])


every_router = pytest.mark.parametrize("option, overrides", EVERY, ids=[_name(*each) for each in EVERY])


class Subject(NamedTuple):
    """A router or an architecture, as a run trains it.

    Attributes:
        name: name of the test.
        overrides: overrides of the tiny run.
        still: names of tensors that have no gradient in the first step by their definition.
    """

    name: str
    overrides: tuple[str, ...]
    still: tuple[str, ...] = ()


MLA = ("model.attention=mla", "model.kv_lora_rank=6", "model.qk_nope_head_dim=4", "model.qk_rope_head_dim=2",
       "model.v_head_dim=5")
# Overrides of the tiny run for each architecture, by its name.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "residual": ("model.block=residual", "model.residual_mixing=sum", "model.num_shared_experts=1"),
    "attention_experts": ("model.attention=experts", "model.num_attention_experts=6", "model.num_heads=4",
                          "model.num_kv_heads=2"),
    "chain": ("model.block=chain", "model.num_shared_experts=1"),
    "chain_inner": ("model.block=chain", "model.chain_rounds=3", "model.chain_residual=inner",
                    "model.chain_share_router=true", "router=sigmoid"),
    "pr_moe": ("model.block=residual", "model.num_experts=[2,6]", "model.top_k=[1,2]", "router.weights=raw"),
    "latent": ("model.block=latent", "model.latent_dim=6", "model.num_shared_experts=1"),
    "sliced": ("model.block=sliced", "router.weights=raw"),
    "normalized": ("expert=normalized",),
    "gpt_oss": ("expert=gpt_oss", "expert.limit=0.1", "router.logit_bias=true"),
    "qwen2_moe": ("model.num_shared_experts=1", "model.shared_dim=12", "model.shared_gate=true",
                  "router.weights=raw"),
    "sliced_attention": ("model.attention=sliced", "model.block=sliced", "model.num_kv_heads=4",
                         "router.weights=raw"),
    "latent_attention": (*MLA, "model.q_lora_rank=7", "optim=muon", "model.rope_interleaved=true",
                         "model.attention_bias=all", "model.attention_multiplier=0.4"),
    "scaled_stream": (
        "model.norm=layer", "model.head_bias=true", "model.embedding_multiplier=3",
        "model.residual_multiplier=0.5", "model.logits_scaling=2", "model.head_dim=8",
        "model.partial_rotary_factor=0.5", "model.rope_interleaved=true",
        "model.rope_scaling={type: yarn, factor: 4, original_max_position_embeddings: 8}",
        "train.head_chunk=5"),
    "gpt_oss_attention": ("model.attention_sinks=true", "model.attention_bias=all", "model.sliding_window=4",
                          "model.sliding_layers=[0]", "model.attention_multiplier=0.4"),
    "olmoe_attention": ("model.qk_norm=all", "model.clip_qkv=0.5", "model.attention_bias=qkv"),
    "multi_token": ("model.mtp_layers=2", "model.num_shared_experts=1", "model.head_bias=true",
                    "model.num_layers=3", "model.moe_layers=[1]", "train.head_chunk=5"),
    "deepseek_moe": ("loss=[z,device_balance,communication_balance]", "router.weights=raw",
                     "router.num_groups=4", "router.topk_groups=2", "model.num_shared_experts=1", *MLA),
}
# The same for routers that are tried in a run alone.
IN_A_RUN: dict[str, tuple[str, ...]] = {
    "hierarchical_sequence": ("router=hierarchical", "router.unit=sequence", "router.num_groups=4",
                              "router.topk_groups=3", "eval.allow_noncausal=true"),
}
# Tensors without a gradient in the first step, by the name of the subject.
STILL: dict[str, tuple[str, ...]] = {
    _name("null_expert", MOE_PLUS_PLUS): ("layers.0.moe.router.logit_map",),         # no layer before it
}
SUBJECTS = [Subject(name, overrides, STILL.get(name, ())) for name, overrides in [
    *((_name(option, overrides), tuple(chosen(option, overrides))) for option, overrides in EVERY),
    *ARCHITECTURES.items(), *IN_A_RUN.items()]]


def router_of(option: str, overrides: list[str], experts: int = E, k: int = K) -> Router:
    """Start values of a wide spread and, where there are controllers, a state that loads have moved."""
    small = [] if "router.kind=linear" in overrides else SMALL.get(option, [])      # nothing there is hidden
    config = compose([f"router={option}", f"model.num_experts={experts}", f"model.top_k={k}",
                      *NEEDS.get(option, []), *small, *overrides])
    with torch.device("meta"):
        router = build(config.router, "router", dim=D, num_experts=experts, top_k=config.model.top_k, layer=0,
                       name="layers.0.moe", num_layers=2, total_steps=100, vocab_size=48)
        router.stand_alone()
    materialize(router, seed=3, std=0.5, num_layers=2)
    generator = torch.Generator().manual_seed(3)
    skew_C = torch.randint(1, 9, (router.num_choices,), generator=generator)
    for _ in range(200 if list(router.buffers()) else 0):
        signs_C = torch.sign(skew_C.double().mean() - skew_C) if router.needs_load_error else None
        router.end_of_step(skew_C, 40, signs_C)
        router.end_of_step_together([router], [skew_C], 40)
    if router.margin_quantile:
        router.take_quantiles(torch.randn(router.num_choices, generator=generator) / 10)
    return router


def chosen_routers(having: Callable[[Router], bool]) -> pytest.MarkDecorator:
    """The routers of EVERY that have a property."""
    cases = [each for each in EVERY if having(router_of(*each))]
    return pytest.mark.parametrize("option, overrides", cases, ids=[_name(*each) for each in cases])


def takes_k_experts(router: Router) -> bool:
    """Whether every token takes K of all experts, the best K by score."""
    return (type(router).choose is Router.choose and router.num_domains is None
            and not router.uses_few_slots and router.num_choices == E and router.max_slots() == K)


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(count: int, first: int = 0, **fields) -> RouterContext:
    numbers_T = torch.arange(first, first + count)
    told = {"step": 1, "router": "layers.0.moe", "sample_ids_T": numbers_T // 4, "positions_T": numbers_T % 4,
            "token_ids_T": 5 * numbers_T % 48, "domains_T": numbers_T // 4 % 4}
    return RouterContext(**{**told, **fields})
