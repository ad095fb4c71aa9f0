"""Decoding of files to UTF-8, with a decision whether they are text at all.

A byte order mark says UTF-8, UTF-16 or UTF-32, whatever `data.encoding` says; without one a file is in
`data.encoding`. Undecodable bytes are counted. In UTF-8 they stay as they are; in other encodings U+FFFD
replaces them.

A file is left out where that would make another text of it: more than a tenth of its bytes are undecodable,
or most of its lines have such bytes. A file in which one byte in a thousand is NUL is no text either; a few
NULs in a book are kept.
"""

import codecs
import unicodedata
from collections.abc import Callable, Iterator

from moetrain.data.account.ledgers import NotText
from moetrain.data.reading.compressed import ByteStream
from moetrain.data.reading.text_blocks import blocks_of

MOST_UNDECODABLE = 0.1           # share of a text's bytes that may be undecodable
MOST_NULS = 0.001                # share of a text's bytes that may be NUL
FEWEST_LINES = 3                 # fewer lines with such bytes are tolerated, even if most lines are
_SAMPLE = 1 << 14                # bytes from which an encoding is guessed

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
          (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def text_blocks(stream: ByteStream, encoding: str, check: "TextCheck") -> Iterator[bytes]:
    """Yield the text of a file as UTF-8 without its byte order mark, in the blocks of `blocks_of`.

    Args:
        stream: the file, at its start.
        encoding: encoding of a file without a byte order mark.
        check: counts undecodable bytes and raises NotText if the file is no text.
    """
    mark, encoding = marked(stream, encoding)
    stream.read(len(mark))
    if is_utf8(encoding):
        check.start = len(mark)
        for block in blocks_of(stream.read):
            check.add(block)
            yield block
    else:
        decoder = _Decoder(stream.read, encoding)
        for block in blocks_of(decoder.read):
            check.add(block, replaced=decoder.take())
            yield block
    check.end()


def marked(stream: ByteStream, encoding: str) -> tuple[bytes, str]:
    """The byte order mark of a file (empty if it has none) and its encoding."""
    head = stream.peek(4)
    return next(((mark, marked) for mark, marked in _MARKS if head.startswith(mark)), (b"", encoding))


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


class TextCheck:
    """Running check of whether a stream is text.

    `undecodable` counts bytes that are no characters. `start` is set to the bytes of the file before the
    first block, so that errors name the right place.
    """

    def __init__(self) -> None:
        self.undecodable = self.start = 0
        self._size = self._nuls = self._lines = self._marred = 0
        self._first: int | None = None                   # offset of the first undecodable byte
        self._nul: int | None = None
        self._sample = b""

    def add(self, block: bytes, replaced: int = 0) -> None:
        """Take the next block. `replaced` counts bytes that U+FFFD replaced when the block became UTF-8."""
        if nuls := block.count(0):
            self._nul = self.start + self._size + block.index(0) if self._nul is None else self._nul
            self._nuls += nuls
        if replaced:
            self._note(block, block.find(b"\xef\xbf\xbd"), replaced)
            self._marred += max(sum(b"\xef\xbf\xbd" in line for line in block.splitlines()), 1)
        else:
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as error:
                self._note(block, error.start, len(block) - len(block.decode("utf-8", "ignore").encode()))
                self._marred += sum(not _decodable(line) for line in block.splitlines())
        self._size += len(block)
        self._lines += block.count(b"\n") + (not block.endswith(b"\n"))
        if self._nuls > MOST_NULS * self._size:
            raise self._binary(block)

    def end(self) -> None:
        """Decide once every block was taken. NotText if the whole is no text."""
        share = self.undecodable / max(self._size, 1)
        if share > MOST_UNDECODABLE:
            why = f"{share:.0%} of its bytes are no characters"
        elif self._marred >= FEWEST_LINES and 2 * self._marred > self._lines:
            why = f"{self._marred:,} of its {self._lines:,} lines have bytes that are no characters"
        else:
            return
        raise NotText("text in another encoding than data.encoding", offset=self._first or 0, why=why,
                      convert=self.hint())

    def hint(self) -> str:
        """The setting that may read the undecodable bytes."""
        return f"data.encoding={guess(self._sample) or '<its encoding>'}"

    def _note(self, block: bytes, at: int, number: int) -> None:
        self.undecodable += number
        if self._first is None:
            self._first = self.start + self._size + max(at, 0)
            self._sample = block[max(at - _SAMPLE // 2, 0):][:_SAMPLE]

    def _binary(self, block: bytes) -> NotText:
        why = f"{self._nuls:,} of its first {self._size:,} bytes are NUL"
        even, odd = block[::2].count(0), block[1::2].count(0)
        # Zeros in every second byte: ASCII in UTF-16.
        if max(even, odd) > 8 * max(min(even, odd), 1) and 4 * (even + odd) > len(block):
            return NotText("text in UTF-16 without its mark, or 16-bit numbers", why=why,
                           offset=self._nul or 0,
                           convert=f"data.encoding=utf-16-{'be' if even > odd else 'le'}, "
                                   "or data=memmap for token ids")
        return NotText("binary", offset=self._nul or 0, why=why)


def guess(sample: bytes) -> str | None:
    """Encoding that bytes look like, for a message only: a guess is not reliable enough to read by."""
    from charset_normalizer import from_bytes

    letters = sum(byte >= 0x80 for byte in sample)
    try:
        if letters < len(sample) / 4 and all(unicodedata.category(char)[0] in "LPS" for char in
                                             bytes(byte for byte in sample if byte >= 0x80).decode("cp1252")):
            return "cp1252"      # Latin letters among ASCII, as in western European languages
    except UnicodeDecodeError:
        pass
    found = from_bytes(sample).best()
    return found.encoding if found and found.encoding != "utf_8" else None


class _Decoder:
    """Incremental conversion of bytes in an encoding to UTF-8."""

    def __init__(self, read: Callable[[int], bytes], encoding: str) -> None:
        self._read, self._decoder, self._replaced = read, codecs.getincrementaldecoder(encoding)(_COUNTED), 0
        self._ended = False

    def read(self, size: int) -> bytes:
        """About `size` bytes; none at the end."""
        text = ""
        while not text and not self._ended:
            content = self._read(size)
            self._ended = not content
            before = _replace.bytes
            text = self._decoder.decode(content, self._ended)
            self._replaced += _replace.bytes - before
        return text.encode("utf-8", "replace")

    def take(self) -> int:
        """Undecodable bytes since the last call."""
        replaced, self._replaced = self._replaced, 0
        return replaced


class _Replace:
    """Codec error handler that replaces like `errors="replace"` and counts bytes.

    One for the whole process is enough, because files are read one after another.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        self.bytes += error.end - error.start
        return "\ufffd", error.end


_COUNTED = "moetrain.counted"
_replace = _Replace()
codecs.register_error(_COUNTED, _replace)


def _decodable(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
