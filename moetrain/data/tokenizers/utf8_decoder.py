"""UTF-8 to characters, a block at a time, with the bytes that each of them came from."""

import codecs
import threading

import numpy as np

# What stands for bytes that are no UTF-8 while their places are looked for: a lone surrogate, which no UTF-8 decodes to.
_BAD, _REPLACEMENT = "\udc00", "\ufffd"
_found = threading.local()


def _note(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), error
    _found.widths.append(error.end - error.start)
    return _BAD, error.end


# An error handler, not a loop over exceptions: every exception would copy the rest of the block.
codecs.register_error("moetrain.note", _note)


class Decoder:
    """The characters of a text that comes in blocks; U+FFFD for bytes that are no UTF-8, as `replace` has it."""

    def __init__(self) -> None:
        self._held = b""

    def add(self, block: bytes, *, last: bool = False) -> tuple[str, np.ndarray]:
        """(characters, uint8 bytes that each of them came from). A character that the block cuts comes with the next one."""
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
