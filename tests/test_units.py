"""Numbers as text."""

import pytest

from moetrain.units import count, decimal, duration, scientific, size


@pytest.mark.parametrize("show, value, text", [
    (duration, 1.27, "1.27s"), (duration, 9.999, "10s"), (duration, 59.4, "59s"), (duration, 59.9, "1m00"),
    (duration, 725, "12m05"), (duration, 11190, "3h06"), (duration, 187200, "2d04h"), (count, 412345, "412k"),
    (decimal, 412e3, "412 k"), (decimal, 999, "999"), (decimal, 3.2e13, "32 T"), (decimal, 1e15, "1e+03 T"),
    (count, 98765, "98.8k"), (count, 12, "12"), (count, 1.5e9, "1.5B"),
    (size, 33.1 * 2**30, "33.1G"), (size, 2048, "2K"),
    (scientific, 2.9e-4, "2.9e-4"), (scientific, 0.0, "0.0e0"),
])
def test_numbers_are_short(show, value: float, text: str) -> None:
    assert show(value) == text


def test_sizes_have_a_unit_and_as_many_digits_as_asked() -> None:
    assert decimal(41_234_567, "B") == "41.2 MB" and decimal(41_234_567, "B", 4) == "41.23 MB"
    assert decimal(512, "B", 4) == "512 B"
