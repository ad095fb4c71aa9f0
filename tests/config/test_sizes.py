"""Parameters by formula are those of models on the meta device; memory by formula is what CPU runs keep."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.comm.mesh import build_mesh, mesh_sizes
from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.config.sizes import count_parameters, rank_memory, shards
from moetrain.model import build
from moetrain.train.memory.graph_memory import measure_graph
from moetrain.train.session import join
from moetrain.train.setup import set_up
from tests.support.any_router import MLA

MODELS = [["model=quickstart"], ["model=olmoe_1b_7b", "model.num_layers=2"],
          ["model=deepseek_v3", "model.num_layers=5"],
          ["model.num_layers=3", "model.num_experts=[0,4,8]", "model.top_k=[3,2,1]",
           "model.first_dense_layers=1", "router.weights=raw",
           "model.num_shared_experts=2", "model.tie_embeddings=true", "model.dense_dim=32"],
          ["model.num_layers=5", "model.moe_layers=every_2", "model.num_shared_experts=1"],
          ["model.num_layers=4", "model.num_experts=[0,4,0,8]", "model.top_k=[3,2,1,1]",
           "router.weights=raw"],
          ["model.block=residual", "model.num_shared_experts=1"],
          ["model.block=chain", "model.chain_rounds=3", "model.num_shared_experts=1"],
          ["model.attention=sliced", "model.num_kv_heads=4", "model.top_k_heads=1"],
          ["model.attention=experts", "model.num_attention_experts=6"],
          ["model.num_shared_experts=4", "model.shared_dim=40", "model.shared_gate=true"],
          ["model.norm=layer", "model.head_bias=true"], [*MLA], [*MLA, "model.q_lora_rank=7"],
          [*MLA, "model.attention_bias=qkv"], [*MLA, "model.q_lora_rank=7", "model.attention_bias=all"],
          ["model.attention_bias=all", "model.attention_sinks=true", "model.qk_norm=all"],
          ["model.mtp_layers=2", "model.moe_layers=every_2", "model.norm=layer"],
          ["model.mtp_layers=1", "model.num_experts=[0,4]", "model.top_k=[3,2]",
           "model.num_shared_experts=1"],
          ["model.mtp_layers=2", "model.first_dense_layers=2"],
          ["model.block=latent", "model.latent_dim=20"]]


@pytest.mark.parametrize("words", MODELS, ids=lambda words: words[0])
def test_parameters_are_those_on_the_meta_device(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "initialize", lambda *arguments,
                        **options: None)      # nothing there to initialize
    config = compose(words)
    model = build.build_model(config, 1000, build_mesh(mesh_sizes("single", 1, None), torch.device("meta")))
    counted = count_parameters(config.model, 1000)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".bank." in name)
    assert (counted.total, counted.experts) == (sum(parameter.numel() for parameter in model.parameters()),
                                                experts)
    visited = sum(routed.bank.form.numbers * model.routers[name].max_slots()
                  for bank, routed in model.banks.items() for name in model.feeds[bank])
    assert counted.active == counted.total - experts + visited


@pytest.mark.parametrize("mode, ep, shard",
                         [("single", None, None), ("ddp", None, None), ("fsdp", None, None),
                          ("fsdp", None, 4),
                                             ("ep", 4, None), ("ep_fsdp", 4, None), ("ep_fsdp", 4, 2),
                          ("fssdp", 4, None)])
def test_shards_are_those_of_the_mesh(mode: str, ep: int | None, shard: int | None) -> None:
    world = 1 if mode == "single" else 8
    given = [f"parallel.{name}={value}" for name, value in (("ep", ep), ("shard", shard)) if value]
    config, sizes = compose([f"parallel={mode}", f"run.nproc={world}",
                             *given]), mesh_sizes(mode, world, ep, shard)
    assert shards(config, world) == (sizes["dp_shard"], sizes["ep"] * sizes["edp_shard"])


SMALL = ["data=synthetic", "data.vocab_size=300", "optim=adamw", "train.global_batch=2", "run.device=cpu",
         "log.wandb=off", "model.dim=256",
         "model.num_layers=4", "model.num_heads=8", "model.num_experts=16", "model.expert_dim=64",
         "train.head_chunk=64"]


@pytest.mark.parametrize("words",
                         [["run.dtype=bfloat16"],
                          ["run.dtype=bfloat16", "model.qk_norm=head", "model.num_shared_experts=1"],
                                   ["run.dtype=float32"],
                          ["run.dtype=bfloat16", "model.block=latent"],
                          ["run.dtype=bfloat16", "model.block=chain", "model.chain_rounds=3"],
                          ["run.dtype=bfloat16", "model.attention=experts"],
                          ["run.dtype=bfloat16", "model.attention=sliced", "model.num_kv_heads=8"],
                          ["run.dtype=bfloat16", "model.block=residual"],
                          ["run.dtype=bfloat16", "model.num_shared_experts=1", "model.shared_gate=true"],
                          ["run.dtype=bfloat16", "expert=gpt_oss"],
                          ["run.dtype=bfloat16", "router=mlp"],
                          ["run.dtype=float32", "router=expert_choice", "eval.allow_noncausal=true"],
                          ["run.dtype=bfloat16", "train.activation_checkpointing=selective"],
                                   ["run.dtype=bfloat16", "train.activation_checkpointing=full"]],
                         ids=lambda words: " ".join(words[:2]))
def test_activations_are_what_a_run_keeps(words: list[str]) -> None:
    """Of one micro-batch, without the block that is computed again: that one is alive in backward alone."""
    config = compose([*SMALL, *words])
    kept = measure_graph(set_up(config, Path("unused"), join(config)))
    by_formula = rank_memory(config, 300, 1).activations - _again(config)
    assert kept == pytest.approx(by_formula, rel=0.08)


def _again(config: Config) -> int:
    """Bytes of the block that is recomputed: a model of one block, without what lies before and after it."""
    if config.train.activation_checkpointing == "none":
        return 0
    one = replace(config, model=replace(config.model, num_layers=1),
                  train=replace(config.train, activation_checkpointing="none"))
    ends = 2 * 2 * config.model.dim * config.train.global_batch * config.train.seq_len
    return rank_memory(one, 300, 1).activations - ends
