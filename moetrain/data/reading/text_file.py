"""A file while it is read: its bytes decompressed and in UTF-8, and what is counted of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

from moetrain.data.account.ledgers import FileEntry
from moetrain.data.reading.compressed import ByteStream, inner_name
from moetrain.data.reading.encodings import TextCheck, is_utf8, marked, text_blocks
from moetrain.data.reading.records import Reading


class TextFile:
    """name: without the suffix of a compression. mark_size: bytes of its byte order mark. in_utf8: it needs no decoding."""

    def __init__(self, path: Path, stream: ByteStream, reading: Reading, entry: FileEntry,
                 advance: Callable[[int], None] | None = None) -> None:
        self.path, self.stream, self.reading, self.entry = path, stream, reading, entry
        self.name = inner_name(path.name)
        mark, self.encoding = marked(stream, reading.encoding)
        self.mark_size, self.in_utf8 = len(mark), is_utf8(self.encoding)
        self._advance = advance

    def blocks(self) -> Iterator[bytes]:
        """The text, as `blocks_of` cuts it. Raises NotText as `TextCheck` does."""
        check, counted = TextCheck(), 0
        for block in text_blocks(self.stream, self.encoding, check):
            self.entry.undecodable += check.undecodable - counted
            counted = check.undecodable
            yield block
            self.advance(self.stream.position)
        if check.undecodable:
            self.entry.convert = check.hint()

    def advance(self, position: int) -> None:
        """So many bytes of the file were read."""
        if self._advance:
            self._advance(position)

    def beginning(self, size: int) -> tuple[str, bool]:
        """(the text of the first `size` bytes, whether that is all of it). It is read again by `blocks`."""
        head = self.stream.peek(size + 1)
        text = head[self.mark_size:size].decode(self.encoding, "ignore")
        return text, len(head) <= size
