"""Sides of tools/bench/train.py: our model and transformers' Qwen3-MoE of the same shape and weights."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moetrain.comm.mesh import build_mesh, mesh_sizes
from moetrain.config.compose import compose
from moetrain.config.schema import Config
from moetrain.data.batches.batch import Batch
from moetrain.losses.language import cross_entropy_sum
from moetrain.model.build import build_model, head_width
from moetrain.model.transformer import Transformer
from moetrain.ops.linear_cross_entropy import linear_cross_entropy
from moetrain.train.micro_batches import step_context

GATHERED_GB = 4.0
SIZES = {"dim": "dim", "layers": "num_layers", "heads": "num_heads", "kv_heads": "num_kv_heads",
         "head_dim": "head_dim", "experts": "num_experts", "top_k": "top_k", "expert_dim": "expert_dim"}


class Side(NamedTuple):
    """One program of the comparison: its loss on a batch, and the parameters that are trained."""

    name: str
    loss: Callable[[Batch], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer


def configured(args: Namespace) -> Config:
    """Config with the sizes of --model, and those that were given in their place."""
    given = [f"model.{key}={getattr(args, name)}" for name, key in SIZES.items()
             if getattr(args, name) is not None]
    return compose([f"model={args.model}", *given, "model.qk_norm=head", "model.init_std=0.05",
                    f"run.dtype={args.dtype}"])


def why_not(config: Config, args: Namespace) -> str | None:
    """Reason why Qwen3-MoE cannot have this model's shape, or None."""
    sizes = config.model
    uneven = not isinstance(sizes.num_experts, int) or not isinstance(sizes.top_k, int)
    if args.peers and (sizes.num_shared_experts or sizes.first_dense_layers or uneven):
        return ("transformers' Qwen3-MoE has no shared experts, no dense layers and one size for all layers: "
                "--peers without a name, for ours alone")
    return None


def make_ours(config: Config, args: Namespace, device: torch.device) -> Transformer:
    return build_model(config, args.vocab, build_mesh(mesh_sizes("single", 1, None), device))


def make_theirs(config: Config, args: Namespace, device: torch.device) -> Qwen3MoeForCausalLM:
    """Qwen3-MoE of transformers with the sizes of the config."""
    sizes = config.model
    with device:
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(
            vocab_size=args.vocab, hidden_size=sizes.dim, intermediate_size=sizes.expert_dim,
            num_hidden_layers=sizes.num_layers, moe_intermediate_size=sizes.expert_dim,
            num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads,
            head_dim=head_width(sizes), num_experts=sizes.num_experts, num_experts_per_tok=sizes.top_k,
            norm_topk_prob=True, rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            rms_norm_eps=sizes.norm_eps, tie_word_embeddings=False, attn_implementation="sdpa",
            use_cache=False)).train()


def implementations() -> list[str]:
    """Names of the experts implementations that transformers offers."""
    return ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def too_large(config: Config, args: Namespace) -> dict[str, str]:
    """Implementations that need too much memory: `batched_mm` gathers an expert's matrices for every row."""
    sizes = config.model
    if not args.peers:
        return {}
    rows, per_row = args.batch * args.seq * sizes.top_k, 3 * sizes.dim * sizes.expert_dim
    gathered = sizes.num_layers * rows * per_row * (4 if args.dtype == "float32" else 2) / 1e9
    if gathered <= GATHERED_GB:
        return {}
    return {"batched_mm": f"would gather {gathered:.0f} GB of weights (limit {GATHERED_GB:.0f} GB)"}


@torch.no_grad()
def copy_weights(model: Transformer, peer: Qwen3MoeForCausalLM) -> None:
    """Copy our weights into theirs; every parameter of theirs is filled."""
    pairs = [(model.embed, peer.model.embed_tokens.weight), (model.norm.weight, peer.model.norm.weight),
             (model.head, peer.lm_head.weight)]
    for ours, theirs in zip(model.layers, peer.model.layers):
        attention, peer_attention, moe = ours.attention, theirs.self_attn, ours.moe
        attended = (peer_attention.q_proj, peer_attention.k_proj, peer_attention.v_proj)
        projections = [projection.weight for projection in attended]
        pairs += zip(attention.qkv.weight.split([len(weight) for weight in projections]), projections)
        pairs += [(ours.attention_norm.weight, theirs.input_layernorm.weight),
                  (ours.ffn_norm.weight, theirs.post_attention_layernorm.weight),
                  (attention.out.weight, peer_attention.o_proj.weight),
                  (moe.router.weight, theirs.mlp.gate.weight),
                  (attention.q_norm.weight, peer_attention.q_norm.weight),
                  (attention.k_norm.weight, peer_attention.k_norm.weight),
                  (moe.experts.bank.gate_up, theirs.mlp.experts.gate_up_proj),
                  (moe.experts.bank.down, theirs.mlp.experts.down_proj)]
    assert {id(theirs) for _, theirs in pairs} == {id(parameter) for parameter in peer.parameters()}
    for ours, theirs in pairs:
        theirs.copy_(ours)


def our_side(model: Transformer, head_chunk: int) -> Side:
    """Our model as a side; `head_chunk` is train.head_chunk."""
    def loss(batch: Batch) -> Tensor:
        def by_chunks(x_BSD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
            return linear_cross_entropy(x_BSD.flatten(0, 1), head_VD, batch.targets_BS.flatten(), head_chunk,
                                        bias_V)

        output = model(batch.tokens_BS, step_context(0, 1, batch), score=by_chunks if head_chunk else None)
        total = output.score if head_chunk else cross_entropy_sum(output.logits_BSV, batch.targets_BS)
        return total / batch.valid_BS.sum()

    return Side("moetrain", loss, *trained(model))


def their_side(peer: Qwen3MoeForCausalLM, implementation: str, args: Namespace) -> Side:
    """Qwen3-MoE as a side, with one of its experts implementations."""
    def loss(batch: Batch) -> Tensor:
        peer.config._experts_implementation = implementation
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return peer(batch.tokens_BS, labels=batch.targets_BS, shift_labels=batch.targets_BS,
                        use_cache=False).loss

    return Side(f"transformers {implementation}", loss, *trained(peer))


def trained(model: nn.Module) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Parameters and optimizer of a side. The rate is small, so that routing stays as it is."""
    parameters = list(model.parameters())
    return parameters, torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def random_batch(args: Namespace, seed: int, device: torch.device) -> Batch:
    """Random tokens, by Zipf's law with --zipf; loads are uneven then, as equal tokens are routed alike."""
    share_V = torch.arange(1, args.vocab + 1).double().pow(-args.zipf)
    generator = torch.Generator().manual_seed(seed)
    drawn = share_V.multinomial(args.batch * (args.seq + 1), replacement=True, generator=generator)
    rows_BS = drawn.view(args.batch, args.seq + 1).to(device)
    tokens_BS, targets_BS = rows_BS[:, :-1].contiguous(), rows_BS[:, 1:].contiguous()
    ids_B = torch.arange(args.batch, device=device)
    valid_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    return Batch(tokens_BS, targets_BS, valid_BS, ids_B, torch.zeros_like(ids_B), None)
