"""Experts of a checkpoint by the names of its tensors, in the spellings of the programs that write them.

    one tensor an expert    …experts.3.w1.weight                        Mixtral, Qwen, DeepSeek, ours
                            …experts.local_experts.3.linear_fc1.weight  Megatron-Core, one module an expert
                            …deepspeed_experts.3.w1.weight              DeepSpeed
                            …experts.linear_fc1.weight3                 Megatron-Core with Transformer Engine
    one tensor a layer      …layers.0.moe.experts.w1  [E, …]            torchtitan, transformers 5, GPT-OSS
                            …block_sparse_moe.input_linear.weight       Granite
    one tensor for all      decoder.layers.mlp.experts.…  [L, E, …]     Megatron-Core's torch_dist

A bank is the experts of a layer: all tensors whose names are the same before `experts`. Its router is looked
for beside it: a tensor whose first dim counts experts. Two-dimensional tensors of a layer's experts
(Megatron's old grouped `experts.weight1`) do not say how many they hold: they are listed as unseen. This file
reads names and shapes alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_ONE_EXPERT = re.compile(r"(?P<bank>(?:.*?\.)?)(?:local_experts|deepspeed_experts|experts)\.(?P<id>\d{1,7})\."
                         r"(?P<matrix>.+)")
_NUMBERED = re.compile(r"(?P<bank>(?:.*?\.)?)experts\.(?P<matrix>(?:.+\.)(?:weight|bias))(?P<id>\d{1,7})"
                       r"(?P<after>(?:\.\w+)?)")
_STACKED = re.compile(r"(?P<bank>(?:.*?\.)?)experts\.(?:experts\.)?(?P<matrix>.+)|"
                      r"(?P<granite>.*\.)(?P<linear>(?:input|output)_linear\.weight)")
_FOLDERS = re.compile(r"(?:\.?(?:experts|local_experts))+\.?$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+(?:\.|$)")
_ROUTER = re.compile(r"(?:gate|router|gating)(?:\.(?:gate|wg|layer|linear|classifier))*(?:\.weight)?")
_PER_EXPERT = re.compile(r"(?:(?:gate|router)\.)?(?:e_score_correction_bias|expert_bias|bias)")
_OPTIMIZER = re.compile(r"(?:^|\.)(?:optim|optimizer|optimizers|opt|exp_avg|exp_avg_sq|momentum_buffer|"
                        r"max_exp_avg_sq|fp32_param|master_param)(?:\.|$)")
_NO_MATRIX = re.compile(r"(?:^|\.)(?:step|_extra_state\w*)(?:\.|$)")
_MINOR = re.compile(r"bias|scale|lora", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


class Place(NamedTuple):
    """Where a matrix of an expert lies: a tensor, and its indices in the tensor's first dims."""

    tensor: str
    indices: tuple[int, ...]


@dataclass
class Bank:
    """Experts of a layer.

    Attributes:
        name: what the names of its tensors begin with.
        matrices: place of every matrix of every expert, by the matrix's name and the expert's id.
        chosen_from: experts that the router beside it chooses from; None where there is none.
        router: tensor that says so.
    """

    name: str
    matrices: dict[str, dict[int, Place]] = field(default_factory=dict)
    chosen_from: int | None = None
    router: str = ""

    @property
    def ids(self) -> set[int]:
        """Experts that have a matrix at least."""
        return {expert for places in self.matrices.values() for expert in places}

    @property
    def is_optimizer(self) -> bool:
        """Whether these are moments of an optimizer, not weights."""
        return all(_OPTIMIZER.search(f"{self.name}.{matrix}") for matrix in self.matrices)


def is_minor(matrix: str) -> bool:
    """Whether a matrix may well be zero or that of another expert: a bias, a scale, an adapter."""
    return _MINOR.search(matrix) is not None


def find_banks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Bank], list[str]]:
    """Find the experts of a checkpoint.

    Args:
        shapes: shapes of all tensors by name.

    Returns:
        Banks in the order of their layers, and tensors of experts that do not say which expert's they are.
    """
    banks: dict[str, Bank] = {}
    unseen: list[str] = []

    def enter(bank: str, matrix: str, expert: int, place: Place) -> None:
        banks.setdefault(bank, Bank(bank)).matrices.setdefault(matrix, {})[expert] = place

    for name, shape in shapes.items():
        if _NO_MATRIX.search(name):
            continue
        if found := _ONE_EXPERT.fullmatch(name):
            enter(_bank_name(found["bank"]), found["matrix"], int(found["id"]), Place(name, ()))
        elif found := _NUMBERED.fullmatch(name):
            matrix = found["matrix"] + found["after"]
            enter(_bank_name(found["bank"]), matrix, int(found["id"]), Place(name, ()))
        elif found := _STACKED.fullmatch(name):
            before, matrix = found["bank"] or found["granite"] or "", found["matrix"] or found["linear"]
            bank, dims = _bank_name(before), len(shape) + ("bias" in matrix)
            if dims >= 4 and not _LAYER.search(before):
                for layer in range(shape[0]):
                    for expert in range(shape[1]):
                        enter(f"{bank} [{layer}]", matrix, expert, Place(name, (layer, expert)))
            elif dims >= 3:
                for expert in range(shape[0]):
                    enter(bank, matrix, expert, Place(name, (expert,)))
            elif dims == 2 and not is_minor(matrix):
                unseen.append(name)
    _find_routers(banks, shapes)
    return sorted(banks.values(), key=lambda bank: in_order(bank.name)), unseen


def in_order(name: str) -> str:
    """Key that sorts names by the numbers in them."""
    return _NUMBER.sub(lambda number: f"{len(number[0]):04d}{number[0]}", name)


def _bank_name(before: str) -> str:
    """Name of the block that holds experts and router: without the folders of experts at its end."""
    return _FOLDERS.sub("", before).rstrip(".")


def _find_routers(banks: dict[str, Bank], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Enter how many experts the router of each bank chooses from; a matrix says more than a bias."""
    blocks: dict[str, list[Bank]] = {}
    for bank in banks.values():
        blocks.setdefault(bank.name.partition(" [")[0], []).append(bank)
    for pattern, dims in ((_ROUTER, 2), (_PER_EXPERT, 1)):
        for name, shape in shapes.items():
            for block in _parents(name):
                rest = name[len(block) + 1:] if block else name
                for bank in blocks.get(block, ()):
                    stacked = " [" in bank.name
                    if bank.chosen_from is None and len(shape) == dims + stacked and pattern.fullmatch(rest):
                        bank.chosen_from, bank.router = shape[stacked], name


def _parents(name: str) -> list[str]:
    """Names of the blocks that a tensor lies in, up to three above it."""
    parts = name.split(".")
    return [".".join(parts[:-up]) for up in range(1, min(4, len(parts)) + 1)]
