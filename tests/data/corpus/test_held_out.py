"""What is held out: a share, or text of the user's own; and identities that older datasets keep."""

from pathlib import Path

import pytest

from moetrain.config.schema import Config, DataConfig, RunConfig
from moetrain.data.corpus.split import as_fraction
from moetrain.data.loader import build_dataset
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared
from moetrain.errors import DataError


def story(number: int) -> str:
    return f"document {number} says \u00fcber {number * number}\n" * 60


def corpus(root: Path, numbers: range = range(40)) -> Path:
    for number in numbers:
        folder = root / ("code" if number % 2 else "prose")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(story(number))
    return root


def run(path: Path | None, out: Path, **more: object) -> Prepared:
    folder = prepare(path=str(path) if path else None, out=out, tokenizer="bytes",
                     **{key: str(value) if key == "held_out" else value for key, value in more.items()})
    return open_prepared(folder, verify=True)


def documents(prepared: Prepared, split: str) -> list[str]:
    stream = getattr(prepared, split)
    ids = stream.read(0, stream.size)
    return [bytes(ids[start:end].tolist()).decode() for start, end in
            zip(stream.document_starts.tolist(),
                [*(stream.document_starts[1:] - 1).tolist(), stream.size - 1])]


def test_a_dataset_of_the_first_release_keeps_its_fingerprint(tmp_path: Path) -> None:
    """A change here makes every run refuse its own data."""
    assert run(corpus(tmp_path / "in"), tmp_path / "out").fingerprint.startswith("f96b6012ca2a")
    assert as_fraction(0.05).denominator == 20 and as_fraction(0.05).numerator == 1


def test_the_share_decides_how_much_is_held_out(tmp_path: Path) -> None:
    source, seen = corpus(tmp_path / "in", range(300)), {}
    for share in (0.001, 0.05, 0.3, 0.9):
        prepared = seen[share] = run(source, tmp_path / "out", held_out_share=share)
        train, heldout = documents(prepared, "train"), documents(prepared, "heldout")
        assert (sorted(train + heldout) == sorted(story(number) for number in range(300))
                and not set(train) & set(heldout))
        assert abs(len(heldout) - 300 * share) < 25 and len(heldout) >= 2            # every domain has some
    assert len({prepared.fingerprint for prepared in seen.values()}) == 4
    (tmp_path / "book.txt").write_text(story(3) * 10)
    for share in (0.02, 0.25):
        (heldout,) = documents(run(tmp_path / "book.txt", tmp_path / "out", held_out_share=share), "heldout")
        assert abs(len(heldout.encode()) - share * len(story(3).encode()) * 10) < 4


def test_held_out_text_of_ones_own_is_whole_and_never_trained_on(tmp_path: Path,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    """The folder is inside data.path; two of its texts are also elsewhere in it, one in its own domain."""
    source = corpus(tmp_path / "in")
    own = corpus(source / "valid", range(100, 106))
    (source / "code" / "copy of 101.txt").write_text(story(101))
    (own / "notes").mkdir()
    (own / "notes" / "a.md").write_text(story(2))
    with caplog.at_level("INFO"):
        prepared = run(source, source / "out", held_out=own)
    assert sorted(documents(prepared, "heldout")) == sorted(story(number) for number in (*range(100, 106), 2))
    assert (sorted(documents(prepared, "train"))
            == sorted(story(number) for number in range(40) if number != 2))
    assert prepared.domains == ("code", "notes", "prose")
    assert sum("2 documents of" in record.message and "data.held_out has them too" in record.message
               for record in caplog.records) == 1
    assert run(source, source / "out", held_out=own).folder == prepared.folder             # found again
    assert run(source, source / "out").fingerprint != prepared.fingerprint
    (own / "notes" / "a.md").write_text(story(3))
    assert run(source, source / "out", held_out=own).fingerprint != prepared.fingerprint


def test_a_domain_without_training_text_is_only_measured(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    (tmp_path / "valid.md").write_text(story(500))
    folder = prepare(path=str(source), out=tmp_path / "out", tokenizer="bytes",
                     held_out=str(tmp_path / "valid.md"))
    for mixture in ("uniform", "proportional"):
        data = build_dataset(Config(data=DataConfig(mixture=mixture), run=RunConfig()), tmp_path, folder)
        assert data.domains == ("code", "md", "prose")
        assert set(data.batch(data.sample_ids(1, range(16))).domains_B.tolist()) == {0, 2}
        assert [sum(len(batch.tokens_BS) for batch in data.heldout(domain, windows=4, batch=4))
                for domain in range(3)] == [0, 4, 0]


def test_one_held_out_file_beside_one_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(map(story, range(9))))
    (tmp_path / "valid.txt").write_text(story(10))
    prepared = run(tmp_path / "train.txt", tmp_path / "out", held_out=tmp_path / "valid.txt")
    assert prepared.domains == ("txt",) and documents(prepared, "heldout") == [story(10)]
    assert documents(prepared, "train") == [(tmp_path / "train.txt").read_text()]  # nothing is cut off
    capped = run(tmp_path / "train.txt", tmp_path / "out", held_out=tmp_path / "valid.txt", domain_cap=999)
    assert capped.description["train"]["txt"]["bytes"] <= 999


@pytest.mark.parametrize("held_out, number", [("in", 104), (".", 104), ("missing", 30), ("empty", 32),
                                              ("blank", 32), ("noise", 31)])
def test_held_out_text_that_cannot_be_used_is_refused_by_its_key(tmp_path: Path, held_out: str,
                                                                 number: int) -> None:
    source = corpus(tmp_path / "in", range(4))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "noise").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=f"E-DATA-{number:03d}") as caught:
        run(source, tmp_path / "out", held_out=tmp_path / held_out)
    assert "data.held_out" in caught.value.where + caught.value.next
    assert not (tmp_path / "out").exists()
