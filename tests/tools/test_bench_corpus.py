"""The bench of a corpus: the same documents in every format, a process of its own, a page by sections."""

from fractions import Fraction
from pathlib import Path

import pytest

from moetrain.data.corpus.selection import find_source, select
from moetrain.data.reading.spool import Spool
from tools.bench import corpus as bench_corpus
from tools.result_page import write_section

SIZE = 40_000                                        # bytes: 20 documents


@pytest.mark.parametrize("name", bench_corpus.FORMATS)
def test_a_source_holds_the_documents(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_corpus, "PASSAGES", 5)
    bench_corpus.FORMATS[name](tmp_path, SIZE)
    with Spool(tmp_path / "spool") as spool:
        found = select(find_source(str(tmp_path), None), spool, share=Fraction(1, 20))
        texts = [b"".join(part.blocks()).decode() for parts in found.parts for part in parts]
    if name == "one file of text":
        assert "".join(texts) == "".join(bench_corpus.documents(SIZE))
    else:
        assert len(texts) >= 20 and sum(map(len, texts)) == sum(map(len, bench_corpus.documents(SIZE)))


def test_a_preparation_is_measured_in_a_process_of_its_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_corpus, "PASSAGES", 5)
    row = bench_corpus.prepared(tmp_path / "made", "files", bench_corpus.make_files, SIZE)
    assert row["documents"] == 4 and row["bytes"] == sum(map(len, bench_corpus.documents(SIZE)))
    assert 20e6 < row["resident"] < 1e9 and not (tmp_path / "made").exists()


def test_a_section_is_put_in_place_of_the_one_that_is_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nWords.\n\n## One\n\nold\n\n### Part\n\n## Two\n\nstays\n")
    write_section(page, "One", "new\n")
    write_section(page, "Three", "more")
    assert page.read_text() == "# Title\n\nWords.\n\n## One\n\nnew\n\n## Two\n\nstays\n\n## Three\n\nmore\n"
