"""Shapes written in letters."""

import pytest

from moetrain.shapes import shapes_of


def test_letters_stand_for_sizes_with_or_without_a_factor() -> None:
    declared = {"gate_up": ("2F", "D"), "bias": ("F",), "sink": (1,), "wide": ("10D", 3)}
    assert shapes_of(declared, D=4, F=6) == {"gate_up": (12, 4), "bias": (6,), "sink": (1,), "wide": (40, 3)}


@pytest.mark.parametrize("widths", [("2G",), ("F2",), ("0F",), ("",), ("F + D",), ()], ids=repr)
def test_what_is_no_width_is_refused(widths) -> None:
    with pytest.raises(ValueError, match="width"):
        shapes_of({"up": widths}, D=4, F=6)
