"""Denoisers of UL2 by name, and the sizes of what they make of a text.

A name is mode, mean span and corrupted percentage, as in r3_15:

    r<span>_<percent>    regular span corruption
    x<span>_<percent>    extreme: long spans, or half of the text
    s_<percent>          sequential: the end of the text, of a random length with this mean (prefix LM)

Tay et al. 2022, "UL2: Unifying Language Learning Paradigms" (arXiv 2205.05131), table 1, has seven: r3_15,
r8_15, s_25, x3_50, x8_50, x64_15, x64_50. The number of spans follows from the length of the text as in T5
(Raffel et al. 2020, arXiv 1910.10683), all divisions rounded to the nearest, halves up:

    noise = percent of length, 1 to length - 1;  spans = noise / span, 1 to the smaller part

data/batches/denoising.py forms the sequences. It is the config that says how many ids they need.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

MODES = ("r", "s", "x")  # in the order of their ids
_NAME = re.compile(r"(?:([rx])([1-9]\d{0,4})|(s))_([1-9]\d?)")


class Denoiser(NamedTuple):
    """One way to corrupt a text.

    Attributes:
        mode: r, s or x.
        span: mean length of a corrupted span; 0 for mode s.
        percent: share of the text that is corrupted.
    """

    mode: str
    span: int
    percent: int


def denoiser_of(name: str) -> Denoiser | None:
    """The denoiser of this name; None where a name has another form."""
    found = _NAME.fullmatch(name)
    return found and Denoiser(found[1] or found[3], int(found[2] or 0), int(found[4]))


def noise_and_spans(denoiser: Denoiser, length: int) -> tuple[int, int]:
    """Number of corrupted tokens and of spans, in modes r and x, in a text of `length` tokens, 2 or more."""
    noise = min(max((2 * length * denoiser.percent + 100) // 200, 1), length - 1)
    spans = (2 * noise + denoiser.span) // (2 * denoiser.span)
    return noise, min(max(spans, 1), noise, length - noise)


def total(denoiser: Denoiser, length: int) -> int:
    """Tokens of the sequence that a text becomes: mode, text, two sentinels a span, and the last one."""
    if denoiser.mode == "s" or length < 2:
        return 1 + length
    return 2 + length + 2 * noise_and_spans(denoiser, length)[1]


@lru_cache(maxsize=4096)
def longest(denoiser: Denoiser, room: int) -> int:
    """Length of the longest text whose sequence has at most `room` tokens; 0 if there is none."""
    return next((length for length in range(room - 1, 0, -1) if total(denoiser, length) <= room), 0)


def special_ids(names: Iterable[str], seq_len: int) -> int:
    """Ids that a mixture adds to the vocabulary: the modes, and the sentinels of the most spans."""
    spans = [0]
    for denoiser in filter(None, map(denoiser_of, names)):
        length = longest(denoiser, seq_len + 1)
        if denoiser.mode != "s" and length > 1:
            spans.append(noise_and_spans(denoiser, length)[1])
    return len(MODES) + max(spans) + 1
