"""The token that ends a document, for a tokenizer.json.

In order of precedence: `data.end_token`, the files beside the tokenizer, a token with a well-known name. A
tokenizer for which none of them gives an answer is refused: a wrong end token shows only when a trained model
never stops.
"""

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from moetrain.config.suggest import nearest
from moetrain.config.values import show
from moetrain.data.tokenizers.source import TokenizerSource
from moetrain.errors import DataError

NEW = "new"                          # data.end_token: one more id behind the vocabulary
KNOWN = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<EOT>",
         "[EOS]", "[SEP]")
_BY_NAME, _BY_ID = (("tokenizer_config.json", "special_tokens_map.json"),
                    ("generation_config.json", "config.json"))


def find_end_id(source: TokenizerSource, vocabulary: Mapping[str, int], special: Sequence[str],
                wanted: str | None) -> int:
    """Find the id that ends a document.

    Args:
        source: the tokenizer and the files beside it.
        vocabulary: ids of all tokens.
        special: tokens that the tokenizer marks as special.
        wanted: value of `data.end_token`.

    Returns:
        An id of the vocabulary, or the first id behind it where `wanted` is NEW.
    """
    size = max(vocabulary.values(), default=-1) + 1
    if wanted == NEW:
        return size
    if wanted is not None:
        if wanted not in vocabulary:
            raise _missing(source, wanted, "data.end_token", special)
        return vocabulary[wanted]
    for name in _BY_NAME:
        token = source.settings.get(name, {}).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if token not in vocabulary:
                raise _missing(source, token, name, special)
            return vocabulary[token]
    for name in _BY_ID:
        if ((id := _first(source.settings.get(name, {}).get("eos_token_id"))) is not None
                and id in set(vocabulary.values())):
            return id
    if (known := next((mark for mark in KNOWN if mark in vocabulary), None)) is not None:
        return vocabulary[known]
    raise DataError(151, "nothing says which token ends a document",
                    where=f"{source.path} (data.end_token=null)",
                    why="no tokenizer_config.json beside it names an eos_token, and none of its tokens has "
                        "a name that is known; "
                        f"{_list(special)}",
                    next=f"data.end_token=<one of its tokens>, or data.end_token={NEW} for an id of its own "
                         "behind the vocabulary")


def _first(value: Any) -> int | None:
    """An integer, or the first of a list of them; None for anything else."""
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int else None


def _missing(source: TokenizerSource, token: str, said_by: str, special: Sequence[str]) -> DataError:
    near = nearest(token, special)
    choice = quote(f"data.end_token={show(near[0])}") if near else "data.end_token=<one of its tokens>"
    return DataError(152, "the token that ends a document is not in the vocabulary",
                     where=f"{source.path} ({said_by})", why=f"{said_by} says {token!r}; {_list(special)}",
                     next=f"{choice}, or data.end_token={NEW} for an id of its own behind the vocabulary")


def _list(special: Sequence[str]) -> str:
    more = f" and {len(special) - 12} more" if len(special) > 12 else ""
    return (f"its special tokens are {', '.join(special[:12])}{more}" if special
            else "it has no special tokens")
