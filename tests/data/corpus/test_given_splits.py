"""Splits that a corpus comes with: what is one, what is none, and how their domains are called."""

from pathlib import Path

import pytest

from moetrain.data.corpus.given_splits import find_splits, unpaired
from moetrain.data.corpus.scan import scan


def roles(*names: str) -> dict[str, list[str]]:
    """The letters that stand for the files of each role: their numbers in the order given."""
    found = find_splits(names)
    return {role: [name for name in names if name in found and found[name].role == role]
            for role in ("train", "valid", "test")
            if any(member.role == role for member in found.values())}


@pytest.mark.parametrize("train, valid, test", [
    ("train/a.txt", "valid/a.txt", "test/a.txt"),
    ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("train-00000-of-00010.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00002.parquet"),
    ("data/c4-train.00000-of-01024.json.gz", "data/c4-validation.00000-of-00008.json.gz",
     "data/c4-test.00000-of-00008.json.gz"),
    ("ptb.train", "ptb.val", "ptb.test"),
    ("train.jsonl.gz", "dev.jsonl", "testing.txt"),
    ("train-clean-100/1.txt", "dev-clean/1.txt", "test-other/1.txt"),
    ("en_ewt-train.txt", "en_ewt-dev.txt", "en_ewt-test.txt"),
    ("Train Set/a.txt", "Validation Set/a.txt", "Test Set/a.txt"),
    ("train2017/a", "val2017/a", "test2017/a"),
    ("x/train_books.txt", "x/valid_news.txt", "x/test.txt"),
    ("train/code/x.py", "held_out/code/y.py", "test/code/z.py"),
    ("train/a", "dev/a", "eval/a"),
    ("ag_news-train-00000-of-00002-2f6c2d1a9f7a2d4b.parquet",
     "ag_news-validation-00000-of-00001-17e5b0e6ac1d3f4b.parquet",
     "ag_news-test-00000-of-00001-0a0b0e6ac1d3f4b1.parquet"),
])
def test_a_split_is_found_by_folders_parts_and_prefixes(train: str, valid: str, test: str) -> None:
    assert roles(train, valid, test) == {"train": [train], "valid": [valid], "test": [test]}
    assert roles(train, valid) == {"train": [train], "valid": [valid]}
    assert roles(valid, test, "other/b.txt") == {}


@pytest.mark.parametrize("names", [
    ("test/a.txt", "b.txt"), ("valid/a.txt", "test/a.txt"), ("train/a.txt", "x/test/a.txt"),
    ("train.py", "test.py"),
    ("training.md", "testing.md"), ("contest.txt", "training.txt"), ("train-test-split.txt", "test.txt"),
    ("trainer.txt", "tests.txt"), ("on the train to x.txt", "a test of y.txt")])
def test_what_only_looks_like_a_split_is_none(names: tuple[str, ...]) -> None:
    assert find_splits(names) == {}


def test_eval_is_the_validation_split_where_there_is_no_other() -> None:
    assert (roles("train/a", "eval/a", "test/a")
            == {"train": ["train/a"], "valid": ["eval/a"], "test": ["test/a"]})


def test_the_strictest_of_nested_splits_counts() -> None:
    names = ("train/train.txt", "train/test.txt", "train/valid.txt", "valid/train.txt", "valid/test.txt",
             "test/train.txt", "test/valid.txt")
    assert roles(*names) == {"train": ["train/train.txt"], "valid": ["train/valid.txt", "valid/train.txt"],
                             "test": ["train/test.txt", "valid/test.txt", "test/train.txt", "test/valid.txt"]}


def test_labels_have_all_of_a_name_but_the_split() -> None:
    names = {"train/code/x.py": "code/x.py", "test/code/x.py": "code/x.py", "de/train.txt": "de/text.txt",
             "de/test.txt": "de/text.txt",
             "ptb.train.txt": "ptb.txt", "ptb.test.txt": "ptb.txt", "wiki_train/x": "wiki/x",
             "wiki_test/x": "wiki/x", "a/train-0-of-2.jsonl.gz": "a/text.jsonl.gz",
             "a/test-0-of-2.jsonl.gz": "a/text.jsonl.gz"}
    assert {name: member.label for name, member in find_splits(names).items()} == names


@pytest.mark.parametrize("names, alone", [
    (("wiki-train_p90.txt", "wiki-valid_p91.txt"), ["wiki-valid_p91.txt"]),
    (("wiki-train-00004.txt", "wiki-val-00001.jsonl.txt.gz"), ["wiki-val-00001.jsonl.txt.gz"]),
    (("train/a.txt", "news/test/b.txt"), ["news/test/b.txt"]),
    (("train/a.txt", "test/b.txt"), []),
    (("books/a.txt", "test/b.txt"), []),                 # nothing says training: a test of something
    (("train.py", "test.py"), []),
    (("ptb.train.txt", "ptb.test.md"), ["ptb.test.md"]),
    (("train.txt", "testing.md", "conv_train.py", "conv_test.py"), []),
])
def test_a_name_that_joins_no_split_though_another_says_training_is_told(names: tuple[str, ...],
                                                                         alone: list[str]) -> None:
    assert unpaired(names, find_splits(names)) == alone


def test_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("wiki-train_p90.txt", "wiki-valid_p91.txt", "wiki-test_p92.txt"):
        (tmp_path / name).write_text(name)
    scan(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "wiki-test_p92.txt" in said and "1 more" in said
    caplog.clear()
    scan(tmp_path, splits=False)
    assert not caplog.records
