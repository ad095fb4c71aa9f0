"""Suggestions: a one-letter typo finds its key."""

import random
import string

from moetrain.config.suggest import distance, nearest, nearest_keys
from moetrain.config.values import schema_keys


def one_letter_typo(word: str, random_: random.Random) -> str:
    at = random_.randrange(len(word))
    letter = random_.choice(string.ascii_lowercase)
    kind = random_.choice(("drop", "add", "change", "swap"))
    if kind == "drop":
        return word[:at] + word[at + 1:]
    if kind == "add":
        return word[:at] + letter + word[at:]
    if kind == "change":
        return word[:at] + letter + word[at + 1:]
    return word[:at] + word[at:at + 2][::-1] + word[at + 2:]


def test_one_letter_typos_find_the_key() -> None:
    keys, random_ = schema_keys(), random.Random(0)
    tried = found = 0
    while tried < 200:
        key = random_.choice(list(keys))
        typo = one_letter_typo(key, random_)
        if typo not in keys:
            tried += 1
            found += key in nearest_keys(typo, keys)
    assert found >= 0.95 * tried


def test_distance_counts_a_swap_once() -> None:
    assert [distance("model", word) for word in ("model", "mdoel", "modl", "modell", "nodel",
                                                 "mdl")] == [0, 1, 1, 1, 1, 2]
    assert distance("", "abc") == 3


def test_nothing_near_is_nothing() -> None:
    assert nearest("zzzzzz", ["train", "eval"]) == []
    assert nearest_keys("zzz.qqqqqq", schema_keys()) == []
    assert nearest("trian", ["train", "eval"]) == ["train"]
