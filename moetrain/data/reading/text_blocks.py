"""Text as bytes: blocks of bounded size that end at lines or characters."""

from collections.abc import Callable, Iterator

BLOCK = 1 << 20                  # bytes


def blocks_of(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield blocks of at most BLOCK bytes from a function that reads up to n bytes.

    Each block but the last ends behind a line; where a line is longer than a block, at the start of a
    character.
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
    """Start of the UTF-8 character at a position.

    It is the position itself where the three bytes before it show no start of a character.
    """
    for start in range(position, max(position - 4, -1), -1):
        if start == len(text) or text[start] & 0xC0 != 0x80:
            return start
    return position
