"""Nearest names: what the user probably meant.

The distance is Damerau-Levenshtein (optimal string alignment): to insert, drop or change a letter, or to swap
neighbours, costs 1 each.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(word: str, names: Iterable[str], count: int = 3) -> list[str]:
    """List at most `count` of the names that are close to the word, nearest first."""
    scored = [(distance(word.lower(), name.lower()), name) for name in names]
    return [name for score, name in sorted(scored) if score <= _limit(name)][:count]


def nearest_keys(path: str, keys: Mapping[str, Any], count: int = 3) -> list[str]:
    """List close keys like `nearest`; the section may be wrong or missing (`lr` finds `optim.lr`).

    Args:
        path: the key that was typed.
        keys: path to a record with `help`. Where no name is close, keys whose help has all the typed words
            count.
        count: at most so many.
    """
    head, _, leaf = path.lower().rpartition(".")
    scored = []
    for key in keys:
        key_head, _, key_leaf = key.rpartition(".")
        whole, ending = distance(path.lower(), key), distance(leaf, key_leaf)
        elsewhere = 1 if head and head != key_head else 0
        if whole <= max(1, len(key) // 5) or ending <= _limit(key_leaf):
            scored.append((min(whole, ending + elsewhere), key))
    if scored:
        return [key for _, key in sorted(scored)][:count]
    words = set(leaf.split("_")) - {""}
    if any(len(word) < 3 or word.isdecimal() for word in words):  # they stand in many helps
        return []
    return [key for key, record in keys.items() if words and words <= _words(record.help)][:count]


def distance(a: str, b: str) -> int:
    """Return the edit distance of two words."""
    before, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _limit(name: str) -> int:
    return 1 if len(name) <= 4 else 2
