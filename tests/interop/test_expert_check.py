"""What is said of experts that are missing, equal, zero or no numbers, and of those that are sound."""

import numpy as np
import pytest
import torch

from moetrain.interop.expert_check import check_experts, unseen
from moetrain.interop.expert_names import find_banks

BANK, ROUTER = "layers.0.moe", "layers.0.moe.router.gate.weight"


class Tensors:
    """Tensors in memory, as a folder offers them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
                torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[self.tensors[name].dtype]

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        tensor = self.tensors[name]
        part = tensor[first:None if rows is None else first + rows].contiguous()
        return part.view(torch.uint8).numpy().view(f"u{tensor.element_size()}").reshape(part.shape)


def sound(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Four experts in two tensors, with biases that are zero, and their router."""
    torch.manual_seed(0)
    experts = {"w1": torch.randn(4, 6, 8), "w2": torch.randn(4, 8, 6), "w2_bias": torch.zeros(4, 8)}
    named = {f"{BANK}.experts.{matrix}": values.to(dtype) for matrix, values in experts.items()}
    return named | {ROUTER: torch.randn(4, 8)}


def faults(tensors: dict[str, torch.Tensor], expected: int | None = None) -> list[str]:
    banks, _ = find_banks({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return [fault for verdict in check_experts(banks, Tensors(tensors), expected=expected)
            for fault in (*verdict.lost, *verdict.alike)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64,
                                   torch.float8_e4m3fn, torch.float8_e5m2])
def test_sound_experts_and_numbers_that_are_none(dtype):
    assert not faults(sound(dtype))
    tensors = sound(dtype)
    tensors[f"{BANK}.experts.w1"][2, 1, 1] = float("nan")
    assert faults(tensors) == ["expert 2 has NaN or infinity in w1"]


def copied(matrices: tuple[str, ...]) -> dict[str, torch.Tensor]:
    tensors = sound()
    for matrix in matrices:
        tensors[f"{BANK}.experts.{matrix}"][3] = tensors[f"{BANK}.experts.{matrix}"][1]
    return tensors


def zeroed(*matrices: str) -> dict[str, torch.Tensor]:
    tensors = sound()
    for matrix in matrices:
        tensors[f"{BANK}.experts.{matrix}"][0] = -0.0
    return tensors


def split() -> dict[str, torch.Tensor]:
    """The experts under names of their own, without biases."""
    whole = sound()
    names = {f"{BANK}.experts.{expert}.{matrix}.weight": whole[f"{BANK}.experts.{matrix}"][expert]
             for expert in range(4) for matrix in ("w1", "w2")}
    return names | {ROUTER: whole[ROUTER]}


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in split().items()
            if name.removeprefix(f"{BANK}.experts.") not in names}


@pytest.mark.parametrize("tensors, expected", [
    (copied(("w1", "w2")), ["experts 1, 3 are equal to each other, byte for byte"]),
    (copied(("w2",)), ["experts 1, 3 are equal to each other in w2"]),
    (zeroed("w1", "w2"), ["expert 0 is zero throughout"]),
    (zeroed("w2"), ["expert 0 is zero in w2"]),
    (split(), []),
    (without("2.w1.weight", "2.w2.weight"), ["expert 2 is missing among 4"]),
    (without("2.w2.weight"), ["expert 2 is without w2.weight"]),
    (without("3.w1.weight", "3.w2.weight"),
     [f"the router ({ROUTER}) chooses from 4 experts, and 3 are there: expert 3 is missing"]),
    (split() | {ROUTER: torch.ones(3, 8)}, [f"4 experts are there, and {ROUTER} knows 3"]),
    (split() | {f"{BANK}.experts.1.w1.weight": torch.ones(6, 9)},
     ["w1.weight has the shapes [6, 8], [6, 9]"]),
])
def test_faults(tensors, expected):
    assert faults(tensors) == expected


def test_a_config_says_what_no_router_says():
    tensors = without("3.w1.weight", "3.w2.weight")
    del tensors[ROUTER]
    assert faults(tensors) == []
    banks, _ = find_banks({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert "no router and no config.json" in next(iter(unseen(banks, [], None)))
    assert not list(unseen(banks, [], 4))
    assert "config.json speaks of 4 experts" in faults(tensors, 4)[0]


def test_layers_with_different_numbers_and_moments_of_unused_experts():
    tensors = {f"layers.{layer}.moe.experts.w1": torch.randn(4 - layer, 2, 2) for layer in range(2)}
    assert all("other layers have another number" in fault for fault in faults(tensors)) and faults(tensors)
    routers = {f"layers.{layer}.moe.router.weight": torch.randn(4 - layer, 2) for layer in range(2)}
    assert not faults(tensors | routers)                  # a pyramid
    assert not faults({f"optim.state.{BANK}.experts.w1.exp_avg": torch.zeros(4, 2, 2)})


def test_one_tensor_for_all_layers():
    tensors = {"decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.randn(2, 4, 3, 3)}
    assert not faults(tensors)
    tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"][1, 2] = 0
    assert faults(tensors) == ["expert 2 is zero throughout"]
