"""Tiny random models of public families that stock transformers makes, and ours with their weights."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.model.build import build_model
from moetrain.model.transformer import Transformer
from moetrain.parallel.state_shards import weights
from moetrain.routers.context import token_context

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
         "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
         "num_experts_per_tok": 2, "attention_dropout": 0.0}
LATENT = {"n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "kv_lora_rank": 10,
          "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_key_value_heads": 4}
# What each family needs beside, with every option of it that has tensors or a formula of its own.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "norm_topk_prob": True,
                  "decoder_sparse_step": 2, "num_hidden_layers": 3},
    "olmoe": {"num_experts": 4, "clip_qkv": 1.5},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12,
                  "mlp_only_layers": [0]},
    "granitemoe": {"num_local_experts": 4, "tie_word_embeddings": True, "embedding_multiplier": 3.0,
                   "residual_multiplier": 0.5, "attention_multiplier": 0.4, "logits_scaling": 2.0},
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 2,
                    "topk_group": 1, "routed_scaling_factor": 4.0, "n_shared_experts": 2},
    "deepseek_v3": {**LATENT, "q_lora_rank": 12, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
                    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0,
                                        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "use_qk_norm": True,
                 "attention_bias": True, "routed_scaling_factor": 1.5, "n_shared_experts": 1},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 5},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True,
               "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_mscale": 1.1,
                                   "long_mscale": 1.2, "short_factor": [1.0, 2.0], "long_factor": [1.0, 4.0],
                                   "original_max_position_embeddings": 64}},
}


class Stock(NamedTuple):
    """A model of transformers, and what its own `save_pretrained` wrote."""

    model: Any
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path


def stock(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Stock:
    """Make a tiny random model of a family by transformers' own classes, and save it.

    Args:
        model_type: of the family.
        folder: where it is saved.
        dtype: of its parameters.
        **changes: keys of its config, over those of SIZES and OF_FAMILY.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SIZES, **OF_FAMILY[model_type], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:                           # norms of other values than 1, biases than 0
            about_one = tensor.ndim == 1 and name.endswith("weight")
            with torch.no_grad():
                tensor.copy_((1.0 if about_one else 0.0) + 0.3 * torch.randn_like(tensor))
    model = model.to(dtype)
    model.save_pretrained(folder)
    return Stock(model, json.loads((folder / "config.json").read_text()), read_folder(folder), folder)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of the shards of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for shard in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(shard).items()}


def to_ours(config: Config, tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Convert all tensors of a folder; those without counterpart are an error."""
    family = FAMILIES[model_type]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    duplicates = family.duplicates(config)
    left = {name: tensor for name, tensor in tensors.items() if name not in duplicates}
    found: dict[str, Tensor] = {}
    for maps in family.tensor_maps(config, config.model.vocab_size, family.spelling(shapes)):
        for one in maps:
            found |= zip(one.ours, one.to_ours(tuple(left.pop(name) for name in one.theirs)), strict=True)
    assert not left, left.keys()
    return found


def to_theirs(config: Config, tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Convert all tensors of a checkpoint; those without counterpart are an error."""
    left, found = dict(tensors), {}
    for maps in FAMILIES[model_type].tensor_maps(config, config.model.vocab_size):
        for one in maps:
            found |= zip(one.theirs, one.to_theirs(tuple(left.pop(name) for name in one.ours)), strict=True)
    assert not left, left.keys()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def run_config(theirs: Mapping[str, Any], dtype: str = "float32", *overrides: str) -> Config:
    """Config of a run of the model that a `config.json` describes."""
    bare = FAMILIES[theirs["model_type"]].bare_config(theirs)
    made = compose(["data=synthetic", f"data.vocab_size={theirs['vocab_size']}", f"run.dtype={dtype}",
                    "run.device=cpu", "log.wandb=off", *overrides])
    return replace(made, model=bare.model, router=bare.router, expert=bare.expert)


def ours(config: Config, tensors: Mapping[str, Tensor]) -> Transformer:
    """Build our model with these weights, by the names of a checkpoint."""
    model = build_model(config, config.model.vocab_size, lone_mesh(torch.device("cpu"))).eval()
    left = dict(tensors)
    with torch.no_grad():
        for shard in weights(model):
            shard.rows.copy_(left.pop(shard.name))
    assert not left, left.keys()
    return model


def logits_of(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Our logits [B, S, V], with gradient."""
    told = token_context(tokens_BS, seed=0, step=0, training=False, first=0,
                         sample_ids_B=torch.arange(len(tokens_BS)))
    return model(tokens_BS, told).logits_BSV


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a folder of Hugging Face's layout with one shard."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
