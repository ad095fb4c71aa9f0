"""Which parameters `train.frozen` freezes, and what it refuses."""

import pytest
import torch

from moetrain.comm.mesh import lone_mesh
from moetrain.config.compose import compose
from moetrain.errors import ConfigError
from moetrain.model.build import build_model, check_model
from moetrain.model.frozen import freeze
from moetrain.model.transformer import Transformer
from moetrain.moe.bank import ExpertBank
from moetrain.moe.expert_form import SwigluExpert
from tests.support.training import TINY

CPU = torch.device("cpu")


def built(*overrides: str, convert_model=None) -> Transformer:
    return build_model(compose([*TINY, *overrides]), 48, lone_mesh(CPU), convert_model)


def frozen(model: Transformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("patterns, names", [
    ("embed", {"embed"}),
    ("layers.1.attention*", {"layers.1.attention.qkv.weight", "layers.1.attention.out.weight",
                             "layers.1.attention_norm.weight"}),
    ("layers.0.moe.experts.*.down,*norm.weight",
     {"layers.0.moe.experts.bank.down", "norm.weight",
      *(f"layers.{layer}.{part}_norm.weight" for layer in (0, 1) for part in ("attention", "ffn"))}),
    ("layers.1.moe.experts.?.gate_up,layers.1.moe.experts.?.down",
     {f"layers.1.moe.experts.bank.{matrix}" for matrix in ("gate_up", "down")}),
])
def test_patterns_are_of_names_in_checkpoints(patterns, names) -> None:
    assert frozen(built(f"train.frozen=[{patterns}]")) == names


@pytest.mark.parametrize("patterns, found", [
    ("layers.0.atention.qkv", "the nearest names .* are layers.*.attention.qkv.weight"),
    ("embed,layers.7.*", "train.frozen=layers.7.* names no parameter"),
    ("layers.0.moe.experts.bank.gate_up", "the nearest names .* are layers.*.moe.experts.*.gate_up"),
    ("layers.0.moe.experts.3.*", "names layers.0.moe.experts.3.gate_up and not layers.0.moe.experts.0"),
    ("*", "every parameter of the model is frozen"),
])
def test_what_names_nothing_a_part_or_everything_is_refused_before_ranks_join(patterns, found) -> None:
    with pytest.raises(ConfigError, match=found):
        check_model(compose([*TINY, f"train.frozen=[{patterns}]", "parallel=ep", "run.nproc=2",
                             "train.micro_batch=8"]))


def test_a_conversion_that_freezes_everything_can_be_evaluated_and_not_trained() -> None:
    freeze_all = lambda model, config: model.requires_grad_(False)  # noqa: E731
    assert len(frozen(built(convert_model=freeze_all))) == len(list(built().parameters()))
    with pytest.raises(ConfigError, match="every parameter of the model is frozen") as raised:
        check_model(compose(TINY), freeze_all)
    assert raised.value.where == "convert_model" and raised.value.code == 2


def test_slices_of_experts_are_frozen_with_their_matrix() -> None:
    bank = ExpertBank(experts=(0, 1), form=SwigluExpert(dim=4, expert_dim=6), cut=(0, 2))
    bank.down.requires_grad_(False)
    bank.down.data = bank.down.data.bfloat16()
    freeze(bank, [])
    assert frozen(bank) == {"down", "down_slices"} and bank.trainable == ("gate_up",)
    assert bank.down_slices.dtype == torch.bfloat16 and bank.gate_up_slices.dtype == torch.float32


def test_a_frozen_parameter_may_have_a_smaller_dtype_and_no_other_may() -> None:
    def halve(model, config) -> None:
        for parameter in (model.embed, model.head):
            parameter.data = parameter.data.bfloat16()
        model.embed.requires_grad_(False)

    for run_dtype, stored in (("float32", torch.float32), ("float64", torch.float64)):
        model = built(f"run.dtype={run_dtype}", convert_model=halve)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert dtypes.pop("embed") == torch.bfloat16 and set(dtypes.values()) == {stored}
