"""Rotary position embedding against its formulas, and against transformers' classes."""

import math

import numpy as np
import pytest
import torch

from moetrain.config.rope_scaling import yarn_logit_factor
from moetrain.model.rotary import Rotary, RotaryEmbedding, rotate
from tests.support.needs import module
from tests.support.rotary import table, turned
from tests.support.stock_transformers import function_in_float64, stock

CPU, F64 = torch.device("cpu"), torch.float64
L = "original_max_position_embeddings"
SCALINGS = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, L: 256},
    "yarn": {"type": "yarn", "factor": 40.0, L: 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
    "gpt_oss": {"type": "yarn", "factor": 32.0, L: 4096, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False},
    "yarn at an end": {"type": "yarn", "factor": 2.0, L: 16, "attention_factor": 0.5},
    "longrope": {"type": "longrope", "factor": 32.0, L: 10, "short_factor": [1.0 + i / 9 for i in range(8)],
                 "long_factor": [2.0 + i for i in range(8)]},
    "phi": {"type": "longrope", L: 10, "short_factor": [1.5] * 8, "long_factor": [7.0] * 8,
            "short_mscale": 1.25, "long_mscale": 1.5},
}


def by_paper(own: dict, width: int, theta: float, length: int) -> tuple[np.ndarray, float]:
    """Frequencies and scale of cos and sin, pair by pair, from the papers."""
    found, scale, s, original = [], 1.0, own.get("factor"), own.get(L)
    for i in range(width // 2):
        f = theta ** (-2 * i / width)
        wave = 2 * math.pi / f
        if own["type"] == "linear":
            f = f / s
        elif own["type"] == "llama3" and wave > original / own["low_freq_factor"]:
            f = f / s
        elif own["type"] == "llama3" and wave >= original / own["high_freq_factor"]:
            m = (original / wave - own["low_freq_factor"]) / (own["high_freq_factor"]
                                                              - own["low_freq_factor"])
            f = (1 - m) * f / s + m * f
        elif own["type"] == "yarn":
            ends = [width * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta))
                    for n in (own.get("beta_fast", 32), own.get("beta_slow", 1))]
            low, high = ends if own.get("truncate") is False else (math.floor(ends[0]), math.ceil(ends[1]))
            low, high = max(low, 0), min(high, width - 1)
            g = min(max((i - low) / (high - low), 0), 1)
            f = g * f / s + (1 - g) * f
        elif own["type"] == "longrope":
            f = f / own["long_factor" if length > original else "short_factor"][i]
        found.append(f)
    m = lambda c: 0.1 * c * math.log(s) + 1                                     # noqa: E731
    if "short_mscale" in own:
        scale = own["long_mscale" if length > original else "short_mscale"]
    elif "attention_factor" in own:
        scale = own["attention_factor"]
    elif own["type"] == "longrope":
        scale = math.sqrt(1 + math.log(s) / math.log(original))
    elif own["type"] == "yarn":
        scale = m(own["mscale"]) / m(own["mscale_all_dim"]) if "mscale" in own else m(1)
    return np.array(found), scale


@pytest.mark.parametrize("length", [10, 11])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_those_of_the_papers(name, length):
    width, theta = 16, 150.0
    rotary = table(3, width, theta, first=length - 3, scaling=SCALINGS[name])
    frequencies, scale = by_paper(SCALINGS[name], width, theta, length)
    angles = np.outer(np.arange(length - 3, length), np.tile(frequencies, 2))
    for ours, truth in ((rotary.cos_Sr, np.cos(angles)), (rotary.sin_Sr, np.sin(angles))):
        np.testing.assert_allclose(ours.numpy(), scale * truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [10, 11])
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "phi"])
def test_angles_are_those_of_transformers(name, length):
    module("transformers", extra="hf")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = {("rope_type" if key == "type" else key): value for key, value in SCALINGS[name].items()}
    config = LlamaConfig(hidden_size=32, num_attention_heads=1, head_dim=32, max_position_embeddings=64,
                         rope_parameters={"rope_theta": 150.0, "partial_rotary_factor": 0.5, **own})
    theirs, scale = function_in_float64(ROPE_INIT_FUNCTIONS[own["rope_type"]])(config, CPU, length)
    ours = RotaryEmbedding(width=16, theta=150.0, scaling=SCALINGS[name])
    torch.testing.assert_close(ours.frequencies(length, CPU), theirs, rtol=1e-10, atol=0)
    assert ours.scale(length) == pytest.approx(scale, rel=1e-12)


def test_short_sequences_of_phi_are_those_of_transformers():
    """In longer ones its class takes the short factors too, unlike the released model and its paper."""
    embedding = stock("phimoe", "PhimoeRotaryEmbedding")
    from transformers import PhimoeConfig

    own = {("rope_type" if key == "type" else key): value for key, value in SCALINGS["phi"].items()}
    config = PhimoeConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=40,
                          rope_parameters={"rope_theta": 150.0, "factor": 4.0, **own})
    theirs = embedding(config)(torch.zeros(1, dtype=F64), torch.arange(10)[None])
    for mine, other in zip(table(10, 16, 150.0, scaling=SCALINGS["phi"]), theirs):
        torch.testing.assert_close(mine, other[0], rtol=0, atol=5e-6)


def test_pairs_and_parts_of_a_head_are_those_of_transformers():
    """Attention scores: DeepSeek's class moves the channels of a pair apart, in queries and keys alike."""
    q, k = torch.randn(2, 1, 3, 7, 8, dtype=F64)
    for ours, family, form in ((table(7, 8, interleaved=True), "deepseek_v3", "_interleave"),
                               (table(7, 4), "glm4_moe", "")):
        halves = table(7, ours.cos_Sr.shape[1])
        mine = rotate(q, ours), rotate(k, ours)
        theirs = stock(family, f"apply_rotary_pos_emb{form}")
        other = theirs(q, k, halves.cos_Sr[None], halves.sin_Sr[None])
        torch.testing.assert_close(*(a @ b.mT for a, b in (mine, other)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions, width", [(0, 4), (1, 2), (7, 6)])
def test_rotating_is_a_complex_product(positions, width):
    x = torch.randn(2, 3, positions, width, dtype=F64, requires_grad=True)
    ours, truth = rotate(x, table(positions, width)), turned(x)
    torch.testing.assert_close(ours, truth)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, truth)))


def test_neighbors_turn_together_where_pairs_are_interleaved():
    """They are the channels of two halves in another order; those beyond the table stay as they are."""
    x = torch.randn(2, 5, 10, dtype=F64)
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    ours = rotate(x, table(5, 6, interleaved=True))
    torch.testing.assert_close(ours[..., order], rotate(x[..., order], table(5, 6)))
    assert torch.equal(ours[..., 6:], x[..., 6:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_passes_gradcheck(interleaved):
    x = torch.randn(1, 2, 3, 6, dtype=F64, requires_grad=True)
    scaled = table(3, 4, interleaved=interleaved, scaling=SCALINGS["yarn"])
    assert torch.autograd.gradcheck(lambda x: rotate(x, scaled), x)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 8, dtype=F64)
    q_Sh, k_Sh = (rotate(t.expand(9, 8), table(9, 8)) for t in (q, k))
    scores = q_Sh @ k_Sh.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert (scores[5, 5] - scores[5, 0]).abs() > 1e-3


def test_angles_are_exact_at_late_positions():
    cos = table(50_000, 2, 1e4, dtype=torch.float32).cos_Sr
    torch.testing.assert_close(cos[-1, 0], torch.tensor(49_999.0, dtype=F64).cos().float(), rtol=0, atol=0)


def test_latent_attention_squares_the_scale_of_all_channels():
    assert yarn_logit_factor(SCALINGS["yarn"]) == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-15)
    assert [yarn_logit_factor(SCALINGS[name]) for name in ("gpt_oss", "linear")] == [1, 1]
    assert yarn_logit_factor({}) == 1 and isinstance(table(1, 2), Rotary)
