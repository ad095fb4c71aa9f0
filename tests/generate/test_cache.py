"""With the key-value cache the logits equal those of running the whole text again."""

import pytest
import torch
from torch import Tensor

from moetrain.generate.cache import KeyValueCache
from moetrain.generate.sample import IncrementalModel, text_key
from moetrain.model.transformer import Transformer
from moetrain.routers.base import RouterContext
from tests.support.any_router import MLA
from tests.support.training import make_run

CONTEXT = 16
EVALUATION = RouterContext(training=False)
KEY = text_key(0, 1, 0)
MODELS = {
    "sparse": [],
    "grouped-norm-shared": ["model.qk_norm=head", "model.num_heads=4", "model.num_kv_heads=1",
                            "model.num_shared_experts=1"],
    "dense-first": ["model.num_layers=3", "model.first_dense_layers=1"],
    "tied-one-expert": ["model.tie_embeddings=true", "model.num_experts=1", "model.top_k=1",
                        "router.weights=raw"],
    "sliced-attention": ["model.attention=sliced", "model.num_kv_heads=4"],
    "attention-experts": ["model.attention=experts", "model.num_attention_experts=5"],
    "latent": [*MLA, "model.q_lora_rank=7"],
    "latent-longrope": [*MLA, "model.rope_scaling={type: longrope, factor: 4, short_factor: [1], "
                        "long_factor: [3], original_max_position_embeddings: 10}"],
    "sinks-and-windows": ["model.attention_sinks=true", "model.attention_bias=all", "model.sliding_window=4",
                          "model.sliding_layers=every_2_from_0"],
    "norms-of-all-heads": ["model.qk_norm=all", "model.clip_qkv=0.5", "model.attention_multiplier=0.7"],
    "scaled-stream": ["model.norm=layer", "model.head_bias=true", "model.embedding_multiplier=3",
                      "model.residual_multiplier=0.5", "model.logits_scaling=2"],
    "yarn-of-neighbors": ["model.rope_interleaved=true", "model.partial_rotary_factor=0.5",
                          "model.rope_scaling={type: yarn, factor: 4, original_max_position_embeddings: 8}"],
    "longrope": ["model.rope_scaling={type: longrope, factor: 4, original_max_position_embeddings: 10, "
                 "short_factor: [1, 2], long_factor: [3, 5]}"],
    "documents": ["data.mask_documents=true"],
}


def model_of(overrides: list[str], dtype: str) -> Transformer:
    return make_run([*overrides, f"run.dtype={dtype}"]).state.model.eval()


def text(tokens: int) -> Tensor:
    return torch.randint(48, (tokens,), generator=torch.Generator().manual_seed(tokens))


def differences(model: Transformer, prompt: int, tokens: int) -> list[float]:
    """Largest relative difference of the logits after each prefix, from `prompt` tokens on."""
    readers = [IncrementalModel(model, CONTEXT, key=KEY, cache=cache) for cache in (True, False)]
    found = []
    for end in range(prompt, tokens + 1):
        ours, truth = (reader.logits(text(tokens)[:end]) for reader in readers)
        found.append(((ours - truth).abs().max() / truth.abs().max()).item())
    return found


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_whole_window(overrides, dtype, tolerance):
    """Run a prompt at once, then single tokens to the end of the window and five beyond, where it slides."""
    model = model_of(overrides, dtype)
    assert max(differences(model, 7, CONTEXT + 5)) <= tolerance


@pytest.mark.parametrize("prompt", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_prompts_of_every_length_are_read(prompt):
    assert max(differences(model_of([], "float64"), prompt, CONTEXT + 3)) <= 1e-12


def test_only_new_tokens_run_until_the_window_slides():
    model, lengths = model_of([], "float32"), []
    model.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    reader = IncrementalModel(model, CONTEXT, key=KEY, cache=True)
    for end in range(CONTEXT - 3, CONTEXT + 3):
        reader.logits(text(30)[:end])
    assert lengths == [CONTEXT - 3, 1, 1, 1, CONTEXT, CONTEXT]


@pytest.mark.parametrize("scope", ["sequence", "local"])
def test_experts_with_a_capacity_read_the_whole_text(scope):
    """Which tokens are dropped depends on all tokens of the pass: a token alone would never be dropped."""
    model = model_of(["capacity=position", f"capacity.scope={scope}", "capacity.eval_factor=0.3",
                      "capacity.min_capacity=1"],
                     "float64")
    assert max(differences(model, 3, CONTEXT)) == 0.0
    alone, together = model_of([], "float64"), model
    with torch.no_grad():
        logits = [m(text(CONTEXT)[None], EVALUATION).logits_BSV for m in (alone, together)]
    assert (logits[0] - logits[1]).abs().max() > 1e-6                 # it does drop here


def test_a_cache_takes_one_position_after_the_first_and_no_more_than_it_holds():
    model = model_of([], "float64")
    cache = KeyValueCache(model, 4)
    read = lambda tokens: model(text(tokens)[None], EVALUATION, cache=cache)  # noqa: E731
    with torch.no_grad():
        read(3)
        read(1)
        assert cache.length == 4
        with pytest.raises(AssertionError, match=r"\(5, torch.Size"):
            read(1)
        cache = KeyValueCache(model, 8)
        read(3)
        with pytest.raises(AssertionError, match="2 positions at once after 3 earlier ones"):
            read(2)
