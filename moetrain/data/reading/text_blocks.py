"""Text as bytes: blocks of bounded size, and the start of a character."""

from collections.abc import Callable, Iterator

BLOCK = 1 << 20                  # bytes


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
