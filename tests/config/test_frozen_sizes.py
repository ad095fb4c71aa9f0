"""What train.frozen leaves to train, by formula, is what it leaves in the model."""

import pytest
import torch

from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.config.frozen_sizes import named_parameters
from moetrain.config.schema import Config
from moetrain.config.sizes import count_parameters, count_trained, rank_memory
from moetrain.model.build import meta_model
from tests.support.any_router import MLA

SHAPES = ["model.num_layers=3", "model.num_shared_experts=1", "model.qk_norm=head"]


def counted(config: Config) -> int:
    return count_trained(config, count_parameters(config.model, 100, config.expert), 100).total


@pytest.mark.parametrize("patterns", [
    "embed,head", "layers.0.*", "*.moe.experts.*.gate_up", "*norm*,*.router.*",
    "layers.1.*,layers.2.attention.*", "*.shared.*,*.ffn.*"])
@pytest.mark.parametrize("words", [
    ["model.first_dense_layers=1"],
    ["model.tie_embeddings=true", "model.num_experts=[1,4,8]", "model.top_k=[1,1,2]", "router.weights=raw",
     "model.moe_layers=[1,2]"],
    ["model.block=residual", "model.first_dense_layers=1"],
    ["model.block=chain", "model.first_dense_layers=1"],
    ["model.attention=sliced", "model.num_kv_heads=4", "model.first_dense_layers=1", "model.qk_norm=none"],
    ["model.attention=experts", "model.first_dense_layers=1", "model.qk_norm=none"],
    [*MLA, "model.qk_norm=none", "model.first_dense_layers=1"],
    ["model.norm=layer", "model.head_bias=true", "model.first_dense_layers=1"],
    ["model.attention_bias=all", "model.attention_sinks=true", "model.first_dense_layers=1"],
    ["model.mtp_layers=2", "model.first_dense_layers=1"],
    ["model.block=latent", "model.first_dense_layers=1"]])
def test_what_is_left_to_train_is_that_of_the_model(patterns: str, words: list[str]) -> None:
    if "tie_embeddings" in " ".join(words):
        patterns = patterns.replace(",head", "")
    config = compose([*SHAPES, *words, f"train.frozen=[{patterns}]"])
    model = meta_model(config, 100, lone_mesh(torch.device("cpu")))
    assert counted(config) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(named.numbers for named in named_parameters(config, 100)) == sum(
        p.numel() for p in model.parameters())


def test_frozen_parameters_take_no_memory_of_the_optimizer() -> None:
    """All but the routers frozen: weights, and next to nothing beside them."""
    state = [rank_memory(compose([*SHAPES, "optim=adamw", f"train.frozen=[{patterns}]"]), 100, 1).state
             for patterns in ("", "embed,head,*norm*,*.attention.*,*.experts.*,*.shared.*,*.ffn.*")]
    assert 1 < 4 * state[1] / state[0] < 1.05


def test_a_model_of_any_depth_is_answered_at_once() -> None:
    assert counted(compose(["model.num_layers=100000000", "train.frozen=[embed]"])) == 0
