"""Rules by which tensors start: any part of a tensor gets the numbers that the whole one has there."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.start import Place, Start, constant, normal, residual_normal, values

PLACE = Place("layers.0.x", (5, 3), 0, seed=1, std=0.5, num_layers=8)
TABLE = torch.arange(15.0).view(5, 3)
RULES = {
    "normal": normal(), "own std": normal(2.0), "residual": residual_normal(), "constant": constant(0.07),
    "table": values(lambda generator: TABLE),
    "drawn table": values(lambda generator: torch.randint(9, (5, 3), generator=generator)),
}


def filled(start: Start, place: Place = PLACE, rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.full((rows, *place.shape[1:]), float("nan")).to(dtype)
    start.fill(found, place)
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_part_has_the_numbers_of_the_whole(rule):
    whole = filled(RULES[rule])
    assert whole.isfinite().all() and filled(RULES[rule]).equal(whole)
    for begin, end in ((0, 2), (2, 5), (4, 5), (3, 3)):
        assert filled(RULES[rule], PLACE._replace(begin=begin), end - begin).equal(whole[begin:end])


@pytest.mark.parametrize("rule, value", [("normal", None), ("constant", 0.07)])
def test_a_number_without_dimensions(rule, value):
    number, vector = torch.empty(()), torch.empty(1)
    RULES[rule].fill(number, PLACE._replace(shape=()))
    RULES[rule].fill(vector, PLACE._replace(shape=(1,)))
    assert number == vector[0] and (value is None or number == torch.tensor(value))


def test_scales():
    plain = filled(RULES["normal"])
    assert filled(normal(1.0)).mul(0.5).equal(plain) and filled(normal(2.0)).equal(filled(normal(1.0)) * 2.0)
    assert filled(RULES["residual"]).equal(filled(normal(1.0)) * (0.5 / 16 ** 0.5))


def test_random_numbers_depend_on_seed_and_name():
    for rule in ("normal", "drawn table"):
        first = filled(RULES[rule])
        assert not first.equal(filled(RULES[rule], PLACE._replace(seed=2)))
        assert not first.equal(filled(RULES[rule], PLACE._replace(name="layers.1.x")))


def test_integers_and_float64():
    assert filled(RULES["table"], dtype=torch.int64).equal(TABLE.long())
    assert filled(constant(1e-8), dtype=torch.float64)[0, 0].item() == 1e-8


def test_a_table_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"layers.0.x has shape \(2,\), the tensor \(5, 3\)"):
        filled(values(lambda generator: torch.zeros(2)))
