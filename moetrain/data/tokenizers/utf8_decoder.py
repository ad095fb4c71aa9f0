"""Incremental UTF-8 decoder that also gives the bytes each character comes from."""

import codecs
import threading

import numpy as np

# Marks invalid bytes until they are counted: a lone surrogate, to which no valid UTF-8 decodes.
_BAD, _REPLACEMENT = "\udc00", "\ufffd"
_found = threading.local()


def _note(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: replace invalid bytes by a lone surrogate and record how many there were."""
    assert isinstance(error, UnicodeDecodeError), error
    _found.widths.append(error.end - error.start)
    return _BAD, error.end


# An error handler instead of a loop over exceptions, each of which would copy the rest of the block.
codecs.register_error("moetrain.note", _note)


class Decoder:
    """Decoder of a text that comes in blocks. Invalid bytes become U+FFFD, as with `errors="replace"`."""

    def __init__(self) -> None:
        self._held = b""

    def add(self, block: bytes, *, last: bool = False) -> tuple[str, np.ndarray]:
        """Decode one more block.

        Returns:
            The characters, and uint8 [characters], the bytes that each comes from. A character that the block
            cuts off comes with the next one.
        """
        block = self._held + block if self._held else block
        _found.widths = []
        text, used = codecs.utf_8_decode(block, "moetrain.note", last)
        self._held = block[used:]
        if text.isascii():
            return text, np.ones(len(text), np.uint8)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        widths = 1 + (codes >= 0x80).astype(np.uint8) + (codes >= 0x800) + (codes >= 0x10000)
        if _found.widths:
            widths[codes == ord(_BAD)] = _found.widths
            text = text.replace(_BAD, _REPLACEMENT)
        return text, widths
