"""Names of token files: splits that are there, shards of one domain, their order."""

from pathlib import PurePosixPath
from typing import Any

import pytest

from moetrain.data.pretokenized.file_names import by_name, natural_key


def grouped(*names: str, **how: Any) -> list[tuple[str, str, str]]:
    return [(str(one.path), one.domain, one.split) for one in by_name(map(PurePosixPath, names), **how)]


@pytest.mark.parametrize("names, domains, splits", [
    (["train.bin", "val.bin", "test.bin"], ["text"] * 3, ["train", "valid", "test"]),
    (["a_train.bin", "a_validation.bin"], ["a", "a"], ["train", "valid"]),
    (["train-code.npy", "dev-code.npy"], ["code", "code"], ["train", "valid"]),
    (["Train/a.npy", "Valid/a.npy"], ["a", "a"], ["train", "valid"]),
    (["wiki/train/x.npy", "wiki/val/x.npy"], ["wiki", "wiki"], ["train", "valid"]),
    (["wiki_train_text.bin", "wiki_valid_text.bin"], ["wiki_text", "wiki_text"], ["train", "valid"]),
    (["c4-train.00000-of-01024.bin", "c4-validation.00000-of-00008.bin"], ["c4", "c4"], ["train", "valid"]),
    (["c4-train.00000-of-01024.bin", "c4-train.00001-of-01024.bin"], ["c4-train", "c4-train"],
     ["train", "train"]),
    (["gpt2.bin", "fineweb10B.bin"], ["gpt2", "fineweb10B"], ["train", "train"]),
])
def test_a_split_that_is_there_is_seen(names: list[str], domains: list[str], splits: list[str]) -> None:
    found = {path: (domain, split) for path, domain, split in grouped(*names)}
    assert [found[name] for name in names] == list(zip(domains, splits))


def test_what_has_no_train_at_its_level_is_no_split() -> None:
    assert (grouped("test/a.bin", "wiki/train/b.bin")
            == [("test/a.bin", "test", "train"), ("wiki/train/b.bin", "wiki", "train")])
    assert grouped("val.bin") == [("val.bin", "val", "train")]
    assert (grouped("fineweb_val_000000.bin", apart="valid")
            == [("fineweb_val_000000.bin", "fineweb", "valid")])


def test_sides_that_lie_apart_have_one_domain_and_a_split_can_be_merged() -> None:
    for side, name in (("train", "c4-train.00000-of-01024.bin"),
                       ("valid", "c4-validation.00000-of-00008.bin")):
        assert grouped(name, apart=side) == [(name, "c4", side)]
    assert (grouped("train.bin", "val.bin", merge=True)
            == [("train.bin", "train", "train"), ("val.bin", "val", "train")])


def test_numbers_are_sorted_by_what_they_are() -> None:
    assert sorted(["s-10", "s-9", "s-1", "r-11"], key=natural_key) == ["r-11", "s-1", "s-9", "s-10"]
    assert [path for path, _, _ in grouped("p-10-00000.npy", "p-2-00001.npy", "p-2-00000.npy")] == [
        "p-2-00000.npy", "p-2-00001.npy", "p-10-00000.npy"]
    assert (grouped("a-1.bin", "a-2.bin", shards=False)
            == [("a-1.bin", "a-1", "train"), ("a-2.bin", "a-2", "train")])
