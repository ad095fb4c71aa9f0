"""A tokenizer that takes special strings for text: `</s>` in a document is four characters, not the end of it.

The tokenizers library can keep special tokens out of what it looks for first, but not out of a model's own vocabulary, where
Unigram and WordPiece find them again. So the special tokens get names that no text has; their ids stay.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

# Two noncharacters of Unicode, which no text is made of, around a hash.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def plain(content: bytes) -> dict[str, Any]:
    """A tokenizer.json that adds nothing to a text and encodes it the same way every time.

    Without a post-processor the offsets of tokens include the spaces that they cover.
    """
    tokenizer = json.loads(content) | {"truncation": None, "padding": None, "post_processor": None}
    if isinstance(tokenizer.get("model"), dict) and tokenizer["model"].get("dropout") is not None:
        tokenizer["model"] = tokenizer["model"] | {"dropout": None}
    return tokenizer


def without_special(tokenizer: dict[str, Any], tokens: Iterable[str]) -> dict[str, Any]:
    """The same tokenizer.json, in which no text leads to one of these tokens."""
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
    """What a merge joins, and what it makes."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}
