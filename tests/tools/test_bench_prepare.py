"""The benchmark of `prepare`: its sources are what they are called, and can be prepared."""

from pathlib import Path

import pytest

from moetrain.data.corpus.scan import scan
from moetrain.data.corpus.sources import documents
from moetrain.data.reading.spool import Spool
from tools.bench import prepare as bench_prepare


@pytest.mark.parametrize("name", bench_prepare.SOURCES)
def test_a_source_has_its_size_and_is_measured(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    bench_prepare.SOURCES[name][1](tmp_path / "in", 60_000)
    with Spool(tmp_path) as spool:
        sizes = [document.size for document in documents(scan(tmp_path / "in").files, spool=spool)]
    assert 60_000 <= sum(sizes) < 80_000
    measured = bench_prepare.measure(str(tmp_path / "in"), "bytes", "1000")
    assert measured["bytes"] == sum(sizes) and measured["seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_text_does_not_repeat_itself() -> None:
    text = bench_prepare.text(1, 40_000) + bench_prepare.text(2, 40_000)
    passages = [text[start:start + 32] for start in range(len(text) - 32)]
    assert len(set(passages)) > 0.99 * len(passages)


def test_a_preparation_is_compared_with_the_library(tmp_path: Path) -> None:
    tokenizer = str(bench_prepare.train_tokenizer(tmp_path / "tokenizer.json"))
    for name, compared in (("book", True), ("lines", False)):
        (tmp_path / name).mkdir()
        bench_prepare.SOURCES[name][1](tmp_path / name, 60_000)
        run = bench_prepare.measure(str(tmp_path / name), tokenizer, "1000")
        assert (bench_prepare.of_library([run, run]) is not None) == compared
    runs = [{"library": 1.0, "seconds": 4.0}, {"library": 3.0, "seconds": 2.0}]
    assert bench_prepare.of_library(runs) == 0.5
