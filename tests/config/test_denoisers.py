"""Names of denoisers, and the sizes of what they make of a text."""

import pytest

from moetrain.config.compose import compose
from moetrain.config.denoisers import (
    Denoiser,
    denoiser_of,
    longest,
    noise_and_spans,
    special_ids,
    total,
)


def test_a_name_says_mode_span_and_percentage() -> None:
    assert denoiser_of("r3_15") == Denoiser("r", 3, 15) and denoiser_of("x64_50") == Denoiser("x", 64, 50)
    assert denoiser_of("s_25") == Denoiser("s", 0, 25)
    for name in ("s3_25", "r_15", "r0_15", "r3_0", "r3_100", "q3_15", "r3_15 "):
        assert denoiser_of(name) is None


def test_numbers_are_those_of_t5() -> None:
    """512 tokens at 15 % and spans of 3: T5's own example has 77 and 26 of them."""
    assert noise_and_spans(Denoiser("r", 3, 15), 512) == (77, 26)
    assert noise_and_spans(Denoiser("x", 64, 15), 40) == (6, 1)          # at least one
    assert noise_and_spans(Denoiser("x", 1, 90), 10) == (9, 1)           # no more than there is rest to part


@pytest.mark.parametrize("name", ["r3_15", "r8_15", "s_25", "x3_50", "x8_50", "x64_15", "x64_50", "x1_99"])
@pytest.mark.parametrize("room", [2, 6, 7, 17, 129, 2049])
def test_the_longest_text_fits_and_a_longer_one_does_not(name: str, room: int) -> None:
    denoiser = denoiser_of(name)
    length = longest(denoiser, room)
    assert total(denoiser, length) <= room
    assert all(total(denoiser, more) > room for more in range(length + 1, length + 5))


def test_ids_are_enough_for_the_most_spans() -> None:
    assert special_ids(["s_25"], 128) == 3 + 1
    assert special_ids(["r3_15", "x3_50"], 128) == 3 + noise_and_spans(
        Denoiser("x", 3, 50), longest(Denoiser("x", 3, 50), 129))[1] + 1


@pytest.mark.parametrize("option", ["ul2", "openmoe"])
def test_the_options_are_those_of_the_papers(option: str) -> None:
    rates = compose(["experiment=debug", f"denoising={option}"]).denoising.rates
    total_rate = sum(rates.values())
    by_mode = {mode: sum(rate for name, rate in rates.items() if name[0] == mode) / total_rate
               for mode in "rsx"}
    assert {mode: round(7 * share) if option == "ul2" else round(10 * share) for mode, share in
            by_mode.items()} == ({"r": 2, "s": 1, "x": 4} if option == "ul2" else {"r": 2, "s": 5, "x": 3})
