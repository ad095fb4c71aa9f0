"""Differences between the tensors of a model and those of a checkpoint, as a message names them."""

import pytest

from moetrain.checkpoint.compare import TensorKind, differences, readable_as

DOWN = "model.layers.0.moe.experts.{}.down"


def test_every_difference_is_named_once_with_both_sides() -> None:
    expected = {"model.embed": TensorKind("F32", (8, 4)), "model.head": TensorKind("F32", (8, 4)),
                "model.norm.weight": TensorKind("F32", (4,)),
                **{DOWN.format(number): TensorKind("F32", (4, 6)) for number in range(3)}}
    found = {"model.embed": TensorKind("F32", (9, 4)), "model.norm.weight": TensorKind("F64", (4,)),
             **{DOWN.format(number): TensorKind("F32", (4, 5)) for number in range(3)},
             "model.layers.1.ffn.down.weight": TensorKind("F32", (4, 6))}
    assert differences(expected, found) == [
        "model.embed: expected F32 [8, 4], found F32 [9, 4]",
        "model.head: expected F32 [8, 4], found none",
        "model.norm.weight: expected F32 [4], found F64 [4]",
        "model.layers.0.moe.experts.*.down: expected F32 [4, 6], found F32 [4, 5] (3 experts)",
        "model.layers.1.ffn.down.weight: expected no such tensor, found F32 [4, 6]"]
    assert differences(expected, expected) == []


@pytest.mark.parametrize("found, expected, readable", [
    ("F32", "F32", True), ("F32", "F64", True), ("BF16", "F32", True), ("F16", "F64", True),
    ("F64", "F32", False), ("F32", "BF16", False), ("I64", "F64", False)])
def test_a_dtype_is_read_as_one_that_holds_its_values(found: str, expected: str, readable: bool) -> None:
    assert readable_as(found, expected) is readable
    same = differences({"x": TensorKind(expected, (2,))}, {"x": TensorKind(found, (2,))})
    assert (same == []) is readable
