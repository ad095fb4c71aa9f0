"""Parser of Megatron's --data-path: the indexed datasets, and the share of the samples from each.

    a/text_document                          one dataset
    a/text_document b/text_document          several, in proportion to their sizes
    0.7 a/text_document 0.3 b/text_document  several, with the share of the samples from each

The syntax is that of megatron.core.datasets.utils.get_blend_from_list; names with spaces stand in quotes.
"""

import math
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from moetrain.errors import DataError


class Blend(NamedTuple):
    """Prefixes of datasets, and their weights where the text gives any."""

    prefixes: list[Path]
    weights: list[float] | None


def parse_blend(text: str, key: str) -> Blend:
    """Parse the datasets that data.path or data.held_out names.

    Args:
        text: value of the key.
        key: name of the key, for errors.
    """
    if os.path.exists(text) or os.path.exists(f"{text}.idx") or os.path.exists(f"{text}.bin"):
        return Blend([Path(text)], None)  # the name of a file may contain spaces
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _refused(text, key, f"it cannot be split into words: {error}") from error
    numbers = [_number(word) for word in words]
    if len(words) % 2 or all(number is None for number in numbers[::2]):
        stray = next((word for word, number in zip(words, numbers)
                      if number is not None and not _exists(word)), None)
        if stray is not None and len(words) > 1:
            raise _refused(
                text, key, f"{stray} is no dataset, and a weight stands before each dataset or before none")
        return Blend([Path(os.path.expanduser(word)) for word in words], None)
    for weight, word, number in zip(words[::2], words[1::2], numbers[::2]):
        if number is None or not (math.isfinite(number) and number > 0):
            raise _refused(text, key, f"{weight}, before {word}, is no weight above 0")
    return Blend([Path(os.path.expanduser(word)) for word in words[1::2]],
                 [number for number in numbers[::2] if number is not None])


def _exists(word: str) -> bool:
    return os.path.exists(f"{os.path.expanduser(word)}.idx")


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _refused(text: str, key: str, why: str) -> DataError:
    return DataError(164, "a blend of datasets is not understood", where=f"{key}={text}", why=why,
                     next=f"{key}='0.7 <prefix> 0.3 <prefix>', "
                          f"or {key}='<prefix> <prefix>' to take them by their size")
