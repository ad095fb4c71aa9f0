"""Shapes written in letters, such as ("2F", "D"), and what they are for given sizes.

A class declares the shapes of its parameters so where they are needed before torch is imported
(moe/expert_form.py): by the config's count of parameters as well as by the model.
"""

import re
from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]
_WIDTH = re.compile(r"([1-9]\d*)?([A-Z])")


def shapes_of(declared: Mapping[str, tuple[str | int, ...]], **letters: int) -> Shapes:
    """Compute declared shapes by name.

    Args:
        declared: widths of each tensor: numbers, or letters with a factor if there is one.
        **letters: sizes, such as D=64.

    Raises:
        ValueError: for a width that is neither, and for a tensor without widths.
    """

    def width(text: str | int) -> int:
        if isinstance(text, int):
            return text
        found = _WIDTH.fullmatch(text)
        if found is None or found[2] not in letters:
            raise ValueError(
                f"{text!r} is no width: it is a number, or one of {', '.join(letters)}, or a multiple of one")
        return int(found[1] or 1) * letters[found[2]]

    for name, widths in declared.items():
        if not widths:
            raise ValueError(f"{name} has no width; a single number is a vector of one")
    return {name: tuple(map(width, widths)) for name, widths in declared.items()}
