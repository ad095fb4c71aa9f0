"""`convert_model`: a user's change of the model, made before it is sharded, on every mesh."""

import pytest
import torch
from torch import nn

from moetrain.config.compose import compose, for_run
from moetrain.config.schema import Config
from moetrain.errors import CheckpointError, ConfigError
from moetrain.model.attention import Attention
from moetrain.model.build import head_width
from moetrain.model.norms import RMSNorm
from moetrain.model.transformer import Transformer
from moetrain.train.evaluation.evaluate_run import evaluate_run
from moetrain.train.loop import train
from tests.support.training import alone, difference, make_run, train_steps, union

STEPS = 3


class NormedAttention(Attention):
    """Attention whose output is normalized."""

    def __init__(self, *, dim: int, eps: float, **sizes: int) -> None:
        super().__init__(dim=dim, eps=eps, **sizes)
        self.out_norm = RMSNorm(dim=dim, eps=eps)

    def forward(self, *arguments: object) -> torch.Tensor:
        return self.out_norm(super().forward(*arguments))


def normalize_attention(model: Transformer, config: Config) -> None:
    sizes = config.model
    for block in model.layers:
        block.attention = NormedAttention(
            dim=sizes.dim, eps=sizes.norm_eps, num_heads=sizes.num_heads, num_kv_heads=sizes.num_kv_heads,
            head_dim=head_width(sizes))


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", ["ddp", "fsdp", "fssdp"])
def test_a_converted_model_trains_alike_on_every_mesh(ranks, mesh: str) -> None:
    words = ["run.dtype=float64", "model.qk_norm=none"]
    checkpointing = "full" if mesh in ("fsdp", "fssdp") else "none"
    truth = alone(words, STEPS, None, normalize_attention)
    ours = union(ranks(2).run(
        train_steps, [*words, f"parallel={mesh}", "run.nproc=2", "train.micro_batch=8",
                      f"train.activation_checkpointing={checkpointing}"], STEPS, None, normalize_attention))
    for name in ("gradients", "parameters"):
        error, tensor = difference(getattr(ours, name), getattr(truth, name))
        assert error < 1e-10, (name, tensor, error)
    added = "layers.1.attention.out_norm.weight"
    assert ours.gradients[added].abs().max() > 0 and (ours.parameters[added] - 1).abs().max() > 0
    assert ours.metrics[0]["loss/ce"] != alone(words, 1).metrics[0]["loss/ce"]


def test_a_run_is_resumed_and_evaluated_with_the_same_conversion(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    words = ["experiment=debug", "run.steps=2", "model.dim=16", "model.qk_norm=none", "train.seq_len=8",
             "train.global_batch=2", "eval.windows=1", "run.device=cpu", "run.name=converted"]
    train(compose([*words, "run.stop_at=1"]), convert_model=normalize_attention)
    with pytest.raises(CheckpointError, match="out_norm.weight is in the checkpoint alone"):
        train(compose(words))
    train(compose(words), convert_model=normalize_attention)
    own = for_run(["run.name=converted"])
    assert evaluate_run(own, convert_model=normalize_attention).step == 2
    with pytest.raises(CheckpointError, match="out_norm.weight is in the checkpoint alone"):
        evaluate_run(own)


def add_with_values(model: Transformer, config: Config) -> None:
    model.layers[0].scale = nn.Parameter(torch.ones(config.model.dim, device="cpu"))


def test_values_that_allocation_would_lose_are_refused() -> None:
    with pytest.raises(ConfigError, match="convert_model left layers.0.scale on the device cpu"):
        make_run([], None, add_with_values)
