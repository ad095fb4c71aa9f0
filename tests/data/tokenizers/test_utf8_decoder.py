"""UTF-8 in blocks: the same characters as of the whole, and every byte counted once."""

from hypothesis import example, given, settings, strategies as st

from moetrain.data.tokenizers.utf8_decoder import Decoder

PARTS = st.lists(st.sampled_from([b"a", "\u00e4".encode(), "\u5b57".encode(), "\U0001f600".encode(), b"\xff",
                                  b"\xe5\xad", b"\xc0\x80",
                                  "\ufffd".encode(), b"\xed\xa0\x80", b"\xf0\x9f"]),
                 max_size=30).map(b"".join)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(PARTS, st.lists(st.integers(0, 90), max_size=5))
@example(b"caf\xe9", [4])
def test_blocks_give_what_the_whole_gives(text: bytes, cuts: list[int]) -> None:
    decoder, bounds = Decoder(), [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = [decoder.add(text[begin:end], last=end == len(text) and number == len(bounds) - 2)
             for number, (begin, end) in enumerate(zip(bounds, bounds[1:]))]
    assert "".join(characters for characters, _ in found) == text.decode("utf-8", "replace")
    widths = [width for _, part in found for width in part.tolist()]
    assert sum(widths) == len(text)
    place = 0
    for character, width in zip(text.decode("utf-8", "replace"), widths):
        assert text[place:place + width].decode("utf-8", "replace") == character
        place += width
