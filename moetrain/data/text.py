"""Text as bytes: blocks of bounded size, the start of a character, and what is no text."""

from collections.abc import Callable, Iterator

BLOCK = 1 << 20                  # bytes
MOST_UNDECODABLE = 0.1           # share of a text's bytes that may be no UTF-8


def blocks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Blocks of at most BLOCK bytes from a function that reads so many bytes.

    Each but the last ends behind a line; where a line is longer, at the start of a character.
    """
    held = b""
    while True:
        while len(held) <= BLOCK and (more := read(BLOCK + 1 - len(held))):
            held += more
        if len(held) <= BLOCK:
            break
        end = held.rfind(b"\n", 0, BLOCK) + 1 or character_start(held, BLOCK)
        yield held[:end]
        held = held[end:]
    if held:
        yield held


def cut(text: bytes) -> Iterator[bytes]:
    """The same blocks of a text in memory."""
    if len(text) <= BLOCK:
        return iter((text,) if text else ())
    view, place = memoryview(text), 0

    def read(size: int) -> bytes:
        nonlocal place
        place += size
        return bytes(view[place - size:place])

    return blocks_of(read)


def character_start(text: bytes, position: int) -> int:
    """The start of the UTF-8 character at a position; the position itself where three bytes before it show none."""
    for start in range(position, max(position - 4, -1), -1):
        if start == len(text) or text[start] & 0xC0 != 0x80:
            return start
    return position


class TextCheck:
    """Decide whether a stream is text: no NUL, and most of its bytes are UTF-8."""

    def __init__(self) -> None:
        self._size = self._undecodable = 0
        self._first: int | None = None

    def add(self, block: bytes) -> int | None:
        """Take the next block. The offset of the first NUL, if there is one."""
        if b"\0" in block:
            return self._size + block.index(b"\0")
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as error:
            if self._first is None:
                self._first = self._size + error.start
            self._undecodable += len(block) - len(block.decode("utf-8", "ignore").encode())
        self._size += len(block)
        return None

    def end(self) -> int | None:
        """The offset of the first undecodable byte, if there are too many of them."""
        return self._first if self._undecodable > MOST_UNDECODABLE * self._size else None


def binary_byte(content: bytes) -> int | None:
    """The offset of the byte that makes it no text, or None."""
    check = TextCheck()
    found = check.add(content)
    return check.end() if found is None else found
