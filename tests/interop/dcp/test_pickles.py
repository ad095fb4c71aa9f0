"""Pickles that are read and never run: those of tensors, and hostile ones in bounded time and memory."""

import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest

from moetrain.interop.dcp import pickles
from moetrain.interop.dcp.pickles import PickleError, read_pickle

ORDERED = "collections.OrderedDict"


class Planted:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (exec, (f"open({str(self.canary)!r}, 'w').close()",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_pickle_makes_of_them(protocol):
    value = {"a": [1, -2, 1 << 70, 2.5, None, True, b"x"], 3: (("deep", ()), {"": "é"}), "s": {1, "two"},
             "many": list(range(3000)), "seven": dict.fromkeys(map(str, range(2500)), 7)}
    if protocol < 4:
        del value["s"]
    if protocol == 2:
        value["a"].pop()                                  # bytes are the call of an encoder there
    assert read_pickle(pickle.dumps(value, protocol), ()) == value


def test_a_planted_command_is_named_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    for content in (pickle.dumps(Planted(canary)), pickle.dumps({"a": [Planted(canary)]}, 2)):
        with pytest.raises(PickleError, match=r"builtins.exec|__builtin__.exec"):
            read_pickle(content, {ORDERED})
    assert not canary.exists()
    pickle.loads(content)
    assert canary.exists()                                # the plant would have worked


@pytest.mark.parametrize("content, fault", [
    (b"\x80\x04" + b"]" * 100 + b"a" * 99 + b".", "nested more than 32 deep"),
    (b"\x80\x04" + b")" + b"\x85" * 100 + b".", "nested more than 32 deep"),
    (b"\x80\x04]q\x00h\x00a.", "already in use"),                         # a list inside itself
    (b"\x80\x04]q\x00\x85h\x00K\x01a.", "already in use"),                # a list that grows inside a tuple
    (b"\x80\x04}]K\x01s.", "a key is of the kind Items"),
    (b"\x80\x04})\x85K\x01s.", "a key is of the kind tuple"),
    (b"\x80\x04}K\x01K\x01sK\x01K\x01s.", "the key 1 twice"),
    (b"\x80\x04}(K\x01u.", "a key without value"),
    (b"\x80\x04\x8b\xff\xff\x00\x00" + b"\x01" * 65535 + b".", "a number of"),
    (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "cannot be read"),             # bytes of 2^64
    (b"\x80\x04h\x07.", "cannot be read"),                                # never remembered
    (b"\x80\x04(.", "not in order"),
    (b"\x80\x04K\x01.K\x02.", "does not end"),
    (b"\x80\x04K\x01", "cannot be read"),
    (b"\x80\x04\xfe.", "cannot be read"),                                 # an opcode that there is not
    (b"\x80\x04\x82\x01.", "opcode EXT1"),
    (b"(S'x'\nios\nsystem\n.", "opcode"),
    (b"cos\nsystem\n(S'x'\ntR.", "os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81.", "os.system"),
    (b"\x80\x04ctorch\nSize\n)R}b}b.", "state of an object twice"),
    (b"\x80\x04K\x01)R.", "no known name"),
    (b"\x80\x04.", "cannot be read|does not end"),
    (b"", "cannot be read|no end"),
])
def test_what_no_checkpoint_holds_is_refused(content, fault):
    with pytest.raises(PickleError, match=fault):
        read_pickle(content, {ORDERED, "torch.Size"})


def test_shared_parts_and_a_large_memo_stay_small():
    """Twenty lists inside each other, each ten times in the next: 10^20 parts in 900 bytes."""
    value: list = []
    for _ in range(20):
        value = [value] * 10
    memo = b"\x80\x04N" + b"".join(b"r" + (number * 214_013 % (1 << 32)).to_bytes(4, "little")
                                   for number in range(20_000)) + b"."
    tracemalloc.start()
    try:
        assert len(read_pickle(pickle.dumps(value), ())) == 10
        assert read_pickle(memo, ()) is None
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_the_number_of_opcodes_has_a_bound(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_OPCODES", 1000)
    with pytest.raises(PickleError, match="more than 1,000 opcodes"):
        read_pickle(pickle.dumps(list(range(2000))), ())


def test_no_prefix_and_no_flipped_byte_of_a_pickle_does_more_than_fail():
    content = pickle.dumps({"state": OrderedDict(a=[1, 2.0, ("x", b"y")]), "rest": {"k": list(range(20))}})
    for place in range(len(content)):
        flipped = bytes([content[place] ^ 0x15])
        for harmed in (content[:place], content[:place] + flipped + content[place + 1:]):
            try:
                read_pickle(harmed, {ORDERED})
            except PickleError:
                pass
