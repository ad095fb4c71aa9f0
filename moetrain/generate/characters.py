"""Streaming decoder from token ids to text: each character is returned as soon as it is complete.

A character may consist of several tokens (bytes, byte fallback, byte-level BPE), and the text of a token may
depend on the token before it (spaces). A token is therefore decoded together with the last ones that gave
text, and the text of these alone is removed from the result. While the result ends in U+FFFD, its last
character is incomplete and nothing is returned. A character that is incomplete at the end is dropped. The
prompt serves as such context, too; its own text is never returned.
"""

import codecs
from collections.abc import Sequence

from moetrain.data.tokenizers.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamingDecoder:
    """Decoder of the ids of one text.

    Args:
        tokenizer: tokenizer of the ids.
        before: ids of the prompt that the text continues.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Ids that are kept as context or are not returned yet, and how many of them are context.
        self._ids, self._num_context = list(before), len(before)
        self._bytes = (
            codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.identity == "bytes" else None)

    def add(self, id: int) -> str:
        """Add the next id; returns the characters that it completes."""
        if self._bytes is not None:
            return self._bytes.decode(bytes([id]))
        self._ids.append(id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._ids, self._num_context = self._ids[self._num_context:], len(self._ids) - self._num_context
        return text

    def rest(self) -> str:
        """Return the complete characters that are left at the end."""
        return "" if self._bytes is not None else self._new_text().rstrip(REPLACEMENT)

    def _new_text(self) -> str:
        """Text of the ids that are not returned yet."""
        known = self._tokenizer.decode(self._ids[:self._num_context])
        return self._tokenizer.decode(self._ids)[len(known):]
