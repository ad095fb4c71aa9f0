"""Numbers as text."""

import pytest

from moetrain.units import count, duration, scientific, size


@pytest.mark.parametrize("show, value, text", [
    (duration, 1.27, "1.27s"), (duration, 9.999, "10s"), (duration, 59.4, "59s"), (duration, 59.9, "1m00"),
    (duration, 725, "12m05"), (duration, 11190, "3h06"), (duration, 187200, "2d04h"), (count, 412345, "412k"),
    (count, 98765, "98.8k"), (count, 12, "12"), (count, 1.5e9, "1.5B"),
    (size, 33.1 * 2**30, "33.1G"), (size, 2048, "2K"), (scientific, 2.9e-4, "2.9e-4"), (scientific, 0.0, "0.0e0"),
])
def test_numbers_are_short(show, value: float, text: str) -> None:
    assert show(value) == text
