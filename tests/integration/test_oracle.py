"""The oracle is right: it equals Hugging Face's Qwen3-MoE, and its balance losses equal their definitions."""

import pytest
import torch
from torch import Tensor

from tests.support import needs
from tests.support.oracle import oracle_logits, oracle_loss

D, F, V, H, KV, HEAD = 16, 8, 32, 4, 2, 8


def make_params(*, layers: int = 2, experts: int = 4, dense: int = 0, shared: int = 0, qk_norm: bool = True,
                tied: bool = False) -> dict[str, Tensor]:
    shapes = {"embed": (V, D), "norm": (D,)} | ({} if tied else {"head": (V, D)})
    for layer in range(layers):
        own = {"attention_norm": (D,), "ffn_norm": (D,), "attention.qkv": ((H + 2 * KV) * HEAD, D),
               "attention.out": (D, H * HEAD)}
        if qk_norm:
            own |= {"attention.q_norm": (HEAD,), "attention.k_norm": (HEAD,)}
        if layer < dense:
            own |= {"ffn.gate_up": (2 * F, D), "ffn.down": (D, F)}
        else:
            own |= {"moe.router": (experts, D)}
            for e in range(experts):
                own |= {f"moe.experts.{e}.gate_up": (2 * F, D), f"moe.experts.{e}.down": (D, F)}
            if shared:
                own |= {"moe.shared.gate_up": (2 * F * shared, D), "moe.shared.down": (D, F * shared)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4 + (len(shape) == 1))
            .requires_grad_() for name, shape in shapes.items()}


def model(**changes) -> dict:
    return dict(num_layers=2, num_heads=H, num_kv_heads=KV, head_dim=HEAD, top_k=2, num_experts=4,
                qk_norm=True) | changes


def make_batch(seed: int, *, batch: int = 2, length: int = 6,
               padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    tokens_BS = torch.randint(V, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    valid_BS = torch.ones(batch, length, dtype=torch.bool)
    valid_BS[-1, length - padding:] = False
    return tokens_BS[:, :-1], tokens_BS[:, 1:].where(valid_BS, -1), valid_BS


@pytest.mark.parametrize("tied, gate, dense", [(False, "renorm", 0), (True, "raw", 1)])
def test_equals_hugging_face_qwen3_moe(tied: bool, gate: str, dense: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    needs.module("transformers", extra="hf")
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    # It computes norms, router and rotation in float32
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    reference = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, moe_intermediate_size=F, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=KV, head_dim=HEAD, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=gate == "renorm", tie_word_embeddings=tied, mlp_only_layers=list(range(dense)),
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager",
        experts_implementation="eager")).double()
    params = make_params(dense=dense, tied=tied)
    theirs = dict(reference.named_parameters())
    names = {name: _places(name) for name in params}
    with torch.no_grad():
        for name, places in names.items():
            for (place, index), rows in zip(places, params[name].split([_rows(theirs, *p) for p in places])):
                theirs[place][index].copy_(rows)
    tokens_BS, targets_BS, valid_BS = make_batch(1)
    settings = model(rope_theta=500.0, gate=gate, tie_embeddings=tied, first_dense_layers=dense)

    logits_BSV, _ = oracle_logits(params, tokens_BS, valid_BS, **settings)
    output = reference(tokens_BS)
    torch.testing.assert_close(logits_BSV, output.logits, rtol=1e-10, atol=1e-10)

    _, ce, _, _ = oracle_loss(params, [(tokens_BS, targets_BS, valid_BS)], **settings)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets_BS.flatten())
    torch.testing.assert_close(ce, loss, rtol=1e-10, atol=1e-10)
    ce.backward()
    loss.backward()
    for name, places in names.items():
        expected = torch.cat([theirs[place].grad[index] for place, index in places])
        torch.testing.assert_close(params[name].grad, expected, rtol=1e-10, atol=1e-10,
                                   msg=lambda m: f"{name}: {m}")


def _rows(theirs: dict[str, Tensor], place: str, index: int | slice) -> int:
    return len(theirs[place][index])


def _places(name: str) -> list[tuple[str, int | slice]]:
    """Where Hugging Face keeps a parameter of the oracle: its parts, top to bottom."""
    whole = slice(None)
    if not name.startswith("layers."):
        outer = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        return [(f"{outer[name]}.weight", whole)]
    _, layer, part = name.split(".", 2)
    if part.startswith("moe.experts."):
        _, _, expert, matrix = part.split(".")
        return [(f"model.layers.{layer}.mlp.experts.{matrix}_proj", int(expert))]
    places = {"attention_norm": ["input_layernorm"], "ffn_norm": ["post_attention_layernorm"],
              "moe.router": ["mlp.gate"],
              "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
              "attention.out": ["self_attn.o_proj"], "attention.q_norm": ["self_attn.q_norm"],
              "attention.k_norm": ["self_attn.k_norm"], "ffn.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
              "ffn.down": ["mlp.down_proj"]}
    return [(f"model.layers.{layer}.{place}.weight", whole) for place in places[part]]


def test_split_into_micro_batches_changes_nothing_but_micro_balance() -> None:
    params = make_params(shared=2)
    parts = [make_batch(1), make_batch(2, padding=3)]
    whole = [tuple(torch.cat(pair) for pair in zip(*parts))]
    settings = model(num_shared_experts=2, balance_weight=0.1, z_weight=0.01)
    for scope, equal in (("global", True), ("none", True), ("micro", False)):
        split, joined = (oracle_loss(params, b, balance_scope=scope, **settings) for b in (parts, whole))
        assert torch.allclose(split[0], joined[0], rtol=1e-12) == equal, scope
        torch.testing.assert_close(split[2], joined[2])
        assert all(torch.equal(a, b) for a, b in zip(split[3], joined[3]))
        # 21 valid tokens, two experts each
        assert all(int(counts_E.sum()) == 2 * 21 for counts_E in split[3])


def test_padding_is_without_influence() -> None:
    params = make_params()
    tokens_BS, targets_BS, valid_BS = make_batch(3, padding=2)
    settings = model(balance_weight=0.1, z_weight=0.1)
    first = oracle_loss(params, [(tokens_BS, targets_BS, valid_BS)], **settings)
    second = oracle_loss(params, [(tokens_BS.where(valid_BS, 7), targets_BS, valid_BS)], **settings)
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)


def test_forced_experts_are_the_ones_used() -> None:
    params = make_params()
    _, _, balance, counts = oracle_loss(params, [make_batch(1)], **model(forced={
        0: torch.tensor([3, 1]), 1: lambda probs_TE: probs_TE.argsort(-1)[:, :2]}))
    assert counts[0].tolist() == [0, 12, 0, 12] and int(counts[1].sum()) == 24
    assert torch.isfinite(balance)


def test_balance_is_one_when_probabilities_are_even() -> None:
    params = make_params()
    with torch.no_grad():
        for layer in range(2):
            params[f"layers.{layer}.moe.router"].zero_()
    total, ce, balance, counts = oracle_loss(params, [make_batch(1)], **model(balance_weight=0.5))
    torch.testing.assert_close(balance.item(), 1.0)
    torch.testing.assert_close(total.item(), ce.item() + 0.5)
    assert counts[0].tolist() == [12, 12, 0, 0]                  # ties go to the lower id


def test_lists_give_every_layer_its_own_sizes() -> None:
    params = make_params(layers=1, experts=4)
    params |= {name.replace("layers.0.", "layers.1."): p
               for name, p in make_params(layers=1, experts=6).items()
               if name.startswith("layers.0.")}
    *_, counts = oracle_loss(params, [make_batch(1)], **model(num_experts=[4, 6], top_k=[1, 3]))
    assert [len(c) for c in counts] == [4, 6] and [int(c.sum()) for c in counts] == [12, 36]
