"""Operations of training by formula.

They are compared with the products that torch counts, the parameters of built models and a published figure.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moetrain.comm.mesh import Mesh, build_mesh, mesh_sizes
from moetrain.config.compose import compose
from moetrain.config.schema import ModelConfig
from moetrain.config.sizes import count_parameters
from moetrain.data.batches.batch import Batch
from moetrain.model import flops
from moetrain.model.build import build_model
from moetrain.model.flops import attended_keys, named_peak, training_flops
from moetrain.train.micro_batches import step_context
from tests.support.any_router import MLA
from tests.support.training import make_run, train_run

SHAPES = {
    "experts": ["model.num_experts=8", "model.top_k=3"],
    "a head's width of its own": ["model.head_dim=24", "model.num_kv_heads=1", "model.qk_norm=head"],
    "shared experts and a dense layer": ["model.num_layers=3", "model.num_shared_experts=2",
                                         "model.first_dense_layers=1"],
    "every second layer": ["model.num_layers=5", "model.moe_layers=every_2", "model.dense_dim=80"],
    "a dense network beside the experts": ["model.block=residual", "model.num_shared_experts=1"],
    "experts in a narrower space": ["model.block=latent", "model.latent_dim=20",
                                    "model.num_shared_experts=1"],
    "latents": [*MLA],
    "latents of queries": [*MLA, "model.q_lora_rank=24"],
    "biases of attention, norms of all heads": ["model.attention_bias=all", "model.qk_norm=all",
                                                "model.clip_qkv=1"],
    "norms and a head with biases": ["model.norm=layer", "model.head_bias=true"],
    "a router with a hidden layer": ["router=mlp", "router.hidden=20"],
    "a router of groups": ["router=hierarchical", "router.num_groups=4", "router.topk_groups=2"],
    "a router of two matrices": ["router=recurrent", "router.cell=identity", "router.state_dim=20"],
    "layers of their own": ["model.num_experts=[4,8]", "model.top_k=[2,3]", "model.tie_embeddings=true"],
}
VOCAB = 48


def of_a_norm(shape: list[int]) -> bool:
    """Norms sum the gradient of their weight by a product with a row of ones, one for each token or head."""
    return shape[0] == 1 and shape[1] % 48 == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_that_run(shape):
    config = compose([*SHAPES[shape], "run.device=cpu"])
    model = build_model(config, VOCAB, build_mesh(mesh_sizes("single", 1, None), torch.device("cpu")))
    tokens_BS = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens_BS, tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool), torch.arange(3),
                  torch.zeros(3), None)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as recorded:
        model(tokens_BS, step_context(0, 1, batch)).logits_BSV.square().sum().backward()
    counted = sum(event.flops for event in recorded.key_averages(group_by_input_shape=True)
                  if event.key in ("aten::mm", "aten::bmm", "aten::addmm")
                  and not of_a_norm(event.input_shapes[0]))
    sizes = config.model
    formula = training_flops(sizes, VOCAB, 16, config.expert, config.router)
    of_a_key = (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim
                if sizes.attention == "mla" else 2 * (sizes.head_dim or sizes.dim // sizes.num_heads))
    attention = 3 * sizes.num_layers * sizes.num_heads * of_a_key * (16 + 1)
    assert counted == tokens_BS.numel() * (formula - attention)


def test_attention_looks_at_what_is_not_masked():
    config = compose(["model.num_layers=1"])
    # Each 2 h for its score, 2 h for its value
    pairs = sum(1 for query in range(16) for key in range(16) if key <= query)
    longer = 16 * (training_flops(config.model, VOCAB, 16) - training_flops(config.model, VOCAB, 0))
    wanted = 3 * config.model.num_heads * (config.model.dim // config.model.num_heads) * 4 * pairs
    # One position sees itself: at length 0 the formula has half of that
    assert longer == wanted - 3 * 16 * 2 * config.model.dim


def test_finer_experts_have_the_parameters_and_the_products_of_coarse_ones() -> None:
    """DeepSeekMoE: m N experts of width F / m with m K of them a token; only the routers grow."""
    coarse, fine, shared = (compose(words).model for words in (
        ["model.num_experts=8", "model.top_k=2", "model.expert_dim=64"],
        ["model.num_experts=32", "model.top_k=8", "model.expert_dim=16"],
        ["model.num_experts=31", "model.top_k=7", "model.expert_dim=16", "model.num_shared_experts=1"]))

    def without_routers(sizes: ModelConfig) -> tuple[int, float]:
        routers = sizes.num_layers * sizes.num_experts * sizes.dim
        return (count_parameters(sizes, VOCAB).total - routers,
                training_flops(sizes, VOCAB, 16) - 6 * routers)

    assert without_routers(coarse) == without_routers(fine) == without_routers(shared)


def test_qwen3_has_the_active_parameters_that_it_is_named_for():
    sizes = compose(["model=qwen3_30b_a3b"]).model
    without_attention = training_flops(sizes, 151936, -1)
    # 3.3 billion active, as published
    assert without_attention / 6 + 151936 * sizes.dim == pytest.approx(3.35e9, rel=5e-3)


@pytest.mark.parametrize("chip, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H200 NVL", 835e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H20", None),
    ("NVIDIA GeForce RTX 4090", None), ("NVIDIA GB200", 2500e12),
])
def test_peaks_are_found_by_the_names_of_drivers(chip, peak):
    assert named_peak(chip) == peak


def test_every_rank_adds_its_chip_unless_they_share_one(monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda device, dtype: 1e9)
    of_four = Mesh(mesh_sizes("ep_fsdp", 4, 2), 0, torch.device("cuda"), {})
    one = 1e9 / training_flops(compose([]).model, VOCAB, 128)
    assert flops.peak_tokens_per_s(compose([]), VOCAB, of_four) == pytest.approx(4 * one)
    assert flops.peak_tokens_per_s(compose(["run.share_gpu=true"]), VOCAB, of_four) is None


def test_a_step_reports_its_share_of_the_peak(monkeypatch):
    assert make_run([]).peak_tokens_per_s is None
    monkeypatch.setattr(flops, "peak_flops", lambda device, dtype: 1e9)
    run = make_run([])
    (metrics,) = train_run(run, 1).metrics
    assert run.peak_tokens_per_s == 1e9 / training_flops(run.config.model, VOCAB, 12)
    assert metrics["throughput/mfu"] == pytest.approx(
        metrics["throughput/tokens_per_s"] / run.peak_tokens_per_s)


def test_a_window_takes_what_it_reaches():
    for seq_len, window in ((16, None), (16, 5), (16, 16), (3, 9)):
        counted = sum(min(position, window or position) for position in range(1, seq_len + 1)) / seq_len
        assert attended_keys(seq_len, window) == pytest.approx(counted)
