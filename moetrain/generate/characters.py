"""Ids that are drawn one by one, as text: whole characters as soon as they are whole.

A character may be several tokens (bytes, byte fallback, byte-level BPE), and what a token stands for may depend on the one
before it (spaces). So a token is decoded together with the last ones that gave text, and what these give alone is taken off.
While the result ends in U+FFFD, a character is not whole yet and nothing is given out. What is not whole at the end is left out.
The prompt is decoded for its end alone: it is never part of what is given out.
"""

import codecs
from collections.abc import Sequence

from moetrain.data.tokenizers.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Characters:
    """Takes ids, gives text.

    Args:
        tokenizer: what the ids belong to.
        before: ids of the text that they continue.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids, self._shown = list(before), len(before)       # ids that are kept, and how many of them have been given out
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.identity == "bytes" else None

    def add(self, id: int) -> str:
        """What the next id completes."""
        if self._bytes is not None:
            return self._bytes.decode(bytes([id]))
        self._ids.append(id)
        text = self._new()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._ids, self._shown = self._ids[self._shown:], len(self._ids) - self._shown
        return text

    def rest(self) -> str:
        """What is whole of the rest, at the end."""
        return "" if self._bytes is not None else self._new().rstrip(REPLACEMENT)

    def _new(self) -> str:
        """What the ids give beyond those that have been given out."""
        known = self._tokenizer.decode(self._ids[:self._shown])
        return self._tokenizer.decode(self._ids)[len(known):]
