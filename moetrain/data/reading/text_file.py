"""A text file while it is read: decompressed, decoded to UTF-8 and counted."""

from collections.abc import Callable, Iterator
from pathlib import Path

from moetrain.data.account.ledgers import FileEntry
from moetrain.data.reading.compressed import ByteStream, inner_name
from moetrain.data.reading.encodings import TextCheck, is_utf8, marked, text_blocks
from moetrain.data.reading.records import Reading


class TextFile:
    """One file under a reader.

    `name` is its name without the suffix of a compression, `mark_size` the bytes of its byte order mark,
    `in_utf8` whether it needs no decoding.

    Args:
        path: the file.
        stream: its bytes, decompressed.
        reading: keys, separator and encoding.
        entry: row of the account in which undecodable bytes are counted.
        advance: called with the bytes of the file read so far.
    """

    def __init__(self, path: Path, stream: ByteStream, reading: Reading, entry: FileEntry,
                 advance: Callable[[int], None] | None = None) -> None:
        self.path, self.stream, self.reading, self.entry = path, stream, reading, entry
        self.name = inner_name(path.name)
        mark, self.encoding = marked(stream, reading.encoding)
        self.mark_size, self.in_utf8 = len(mark), is_utf8(self.encoding)
        self._advance = advance

    def blocks(self) -> Iterator[bytes]:
        """The text in the blocks of `blocks_of`. Raises NotText as `TextCheck` does."""
        check, counted = TextCheck(), 0
        for block in text_blocks(self.stream, self.encoding, check):
            self.entry.undecodable += check.undecodable - counted
            counted = check.undecodable
            yield block
            self.advance(self.stream.position)
        if check.undecodable:
            self.entry.convert = check.hint()

    def advance(self, position: int) -> None:
        """Report that so many bytes of the file were read."""
        if self._advance:
            self._advance(position)

    def beginning(self, size: int) -> tuple[str, bool]:
        """Look at the text of the first `size` bytes, which `blocks` reads again.

        Returns:
            The text, and whether it is all of the file.
        """
        head = self.stream.peek(size + 1)
        text = head[self.mark_size:size].decode(self.encoding, "ignore")
        return text, len(head) <= size
