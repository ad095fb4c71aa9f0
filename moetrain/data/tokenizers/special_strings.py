"""A tokenizer.json changed so that special strings in a text stay text: `</s>` is then four characters.

The tokenizers library can exclude special tokens from its first search through a text, but not from the
model's own vocabulary, where Unigram and WordPiece find them again. So the special tokens are renamed to
strings that occur in no text; their ids stay.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

# Names are a hash between two Unicode noncharacters, which occur in no text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def without_processing(content: bytes) -> dict[str, Any]:
    """A tokenizer.json without truncation, padding, post-processor and dropout.

    It adds nothing to a text and encodes it the same way every time. Without a post-processor the offsets of
    tokens include the spaces that they cover.
    """
    tokenizer = json.loads(content) | {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(tokenizer.get("model"), dict) and tokenizer["model"].get("dropout") is not None:
        tokenizer["model"] = tokenizer["model"] | {"dropout": None}
    return tokenizer


def without_special(tokenizer: dict[str, Any], tokens: Iterable[str]) -> dict[str, Any]:
    """The same tokenizer.json, renamed so that no text encodes to one of these tokens."""
    names = {token: f"{_OPEN}{hashlib.sha256(token.encode()).hexdigest()[:16]}{_CLOSE}" for token in tokens}
    added = [token | {"content": names.get(token["content"], token["content"])}
             for token in tokenizer.get("added_tokens") or []]
    model = dict(tokenizer["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), *score] for token, *score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not names.keys() & _parts(merge)]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return tokenizer | {"added_tokens": added, "model": model}


def _parts(merge: str | list[str]) -> set[str]:
    """The two tokens that a merge joins, and the one that it makes."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}
