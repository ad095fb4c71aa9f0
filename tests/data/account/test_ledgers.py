"""The two ledgers of a corpus: their sums, and what counts as left out by mistake."""

import json
from collections.abc import Iterator

import pytest

from moetrain.data.account.ledgers import (
    BINARY,
    DUPLICATES,
    HELD,
    HIDDEN,
    OWN,
    TEST,
    TRAINED,
    Account,
    FileLedger,
    left_out_by_mistake,
)
from moetrain.data.account.text import account_lines, is_account, left_out_line


def ledger() -> FileLedger:
    files = FileLedger("data.path", "corpus")
    for name, size, reason in (("a.txt", 100, ""), ("b.jsonl.gz", 50, ""), (".git/x", 900, HIDDEN),
                               ("runs/a/log", 800, OWN), ("test.txt", 700, TEST)):
        entry = files.add(name, size, reason)
        if not reason:
            entry.format, entry.documents, entry.text = "text", 1, 2 * size
    files.add("c.tar", 30).leave_out(BINARY, format="a tar archive", convert="tar -xf c.tar")
    files.add("d.tar", 31).leave_out(BINARY, format="a tar archive", convert="tar -xf d.tar")
    return files


def test_what_is_kept_adds_up() -> None:
    files = ledger()
    account = Account([files])
    account.note(TRAINED, [150, 100])
    account.note(HELD, [30])
    account.note(DUPLICATES, [20])
    record = account.record()
    kept = record["files"]["data.path"]
    assert sum(row["bytes"] for row in kept["read"] + kept["left_out"]) == kept["bytes"] == 2611
    assert sum(row["files"] for row in kept["read"] + kept["left_out"]) == kept["files"] == 7
    assert [(row["reason"], row["bytes"], row["first"]) for row in kept["left_out"]] == [
        (HIDDEN, 900, ".git/x"), (OWN, 800, "runs/a/log"), (TEST, 700, "test.txt"), (BINARY, 61, "c.tar")]
    assert (record["text"]["bytes"] == sum(tally["bytes"] for tally in record["text"]["became"].values())
            == 300)


def test_text_that_nobody_accounts_for_is_a_bug() -> None:
    account = Account([ledger()])
    account.note(TRAINED, [299])
    with pytest.raises(AssertionError):
        account.record()


def test_only_what_might_have_been_meant_counts_as_a_mistake() -> None:
    files = ledger()
    assert left_out_by_mistake([files]) == (61, 211)
    files.entries[0].undecodable = 25                       # an eighth of its text, so of its bytes
    assert left_out_by_mistake([files]) == (61 + 12, 211)
    files.entries[0].leave_out(BINARY)
    assert left_out_by_mistake([files]) == (161, 211) and files.entries[0].text == 0


def test_an_account_that_was_altered_is_none() -> None:
    """Whatever shows an account takes it as `is_account` found it."""
    account = Account([ledger()])
    account.note(TRAINED, [300])
    record = json.loads(json.dumps(account.record()))
    assert is_account(record) and account_lines(record) and left_out_line(record)
    places = [path for path, _ in _leaves(record)]
    for path in places:
        altered = json.loads(json.dumps(record))
        inner = altered
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = ["x"] if inner[path[-1]] != ["x"] else 1
        if is_account(altered):
            account_lines(altered), left_out_line(altered)
    for value in (None, [], {}, {"files": {}, "text": {}},
                  {"files": {"data.path": 1}, "text": record["text"]}):
        assert not is_account(value)


def _leaves(value: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key), child
        yield from _leaves(child, (*path, key))


def test_the_line_of_the_banner_says_what_is_missing_and_nothing_else() -> None:
    files = FileLedger("data.path", "corpus")
    entry = files.add("a.txt", 100)
    entry.format, entry.documents, entry.text = "text", 1, 100
    files.add("empty.txt", 0, "empty")
    account = Account([files])
    account.note(TRAINED, [100])
    assert left_out_line(account.record()) == ""
    files.add("b.png", 7).leave_out(BINARY, format="an image")
    assert left_out_line(account.record()) == "not text, an image: 1 file, 7 bytes"
