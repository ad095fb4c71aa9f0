"""Megatron's syntax of blends and splits, and the id that documents end in."""

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.support import needs

needs.module("megatron.core", extra="megatron")

from moetrain.config.compose import compose
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.loader import build_dataset
from moetrain.errors import DataError
from moetrain.interop.megatron_blend import parse_blend
from tests.support.indexed_data import build, numbered

IDS = ("data.tokenizer=none", "data.vocab_size=4000", "train.seq_len=10", "train.global_batch=20")


def dataset(path: Path | str, *overrides: str) -> TokenDataset:
    return build_dataset(compose(["data=megatron", f"data.path={path}", *IDS, *overrides]), Path("unused"),
                         None)


def refused(path: Path | str, *overrides: str) -> DataError:
    with pytest.raises(DataError) as caught:
        dataset(path, *overrides)
    assert caught.value.next
    return caught.value


def shares(data: TokenDataset, samples: int) -> list[float]:
    """Share of the first samples that comes from each domain."""
    ids = np.concatenate([data.sample_ids(step, range(20)) for step in range(1, samples // 20 + 1)])
    domains = data.batch(ids).domains_B.tolist()
    return [domains.count(number) / len(domains) for number in range(len(data.domains))]


@pytest.fixture(scope="module")
def ab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two datasets, with 4,000 and 1,000 tokens."""
    folder = tmp_path_factory.mktemp("blend")
    (folder / "with space").mkdir()
    build(folder / "a", numbered(80), np.int32)
    build(folder / "with space" / "b", numbered(20), np.int32)
    return folder / "a", folder / "with space" / "b"


def test_the_words_are_those_of_megatron() -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    for words in (["a"], ["a", "b"], ["0.7", "a", "0.3", "b"], ["30", "a"], ["1e-1", "a/x", "2", "b"],
                  ["a", "b", "c"]):
        prefixes, weights = get_blend_from_list(words)
        assert parse_blend(" ".join(words), "data.path") == ([Path(prefix) for prefix in prefixes],
                                                             weights), words


def test_weights_are_shares_of_the_samples(ab: tuple[Path, Path]) -> None:
    a, b = ab
    data = dataset(f'0.25 {a} 0.75 "{b}"')
    assert data.domains == ("a", "b") and shares(data, 400) == pytest.approx([0.25, 0.75], abs=0.01)
    assert shares(dataset(f'3 {a} 1 "{b}"'), 400) == pytest.approx([0.75, 0.25], abs=0.01)
    by_size = dataset(f'{a} "{b}"')
    # One epoch takes all windows that there are.
    assert shares(by_size, 400) == pytest.approx([0.8, 0.2], abs=0.02)
    # The tokens are the same, in another order.
    assert by_size.fingerprint == data.fingerprint


def test_held_out_prefixes_are_evaluated_and_not_trained_on(ab: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = ab
    data = dataset(a, f'data.held_out="{b}"')
    assert data.domains == ("a", "b") and data.train_stream.size == 4000 and data.heldout_stream.size == 1000
    assert data.train_stream.domain_range(1) == (4000, 4000) and data.heldout_stream.domain_range(0) == (0, 0)
    build(tmp_path / "wiki_train_text_document", numbered(40), np.int32)
    build(tmp_path / "wiki_valid_text_document", numbered(3), np.int32)
    typed = dataset(tmp_path / "wiki_train_text_document",
                    f"data.held_out={tmp_path / 'wiki_valid_text_document'}")
    assert typed.domains == ("wiki_text_document",)
    assert (typed.train_stream.size, typed.heldout_stream.size) == (2000, 150)


def test_a_folder_with_train_and_valid_is_split_as_it_is(tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name, count in (("train", 40), ("valid", 3), ("test", 2)):
        build(tmp_path / f"wiki_{name}_text", numbered(count), np.int32)
    data = dataset(tmp_path)
    assert (data.train_stream.size, data.heldout_stream.size) == (2000, 150)
    assert data.domains == ("wiki_text",)
    assert "left alone, as a test set is: wiki_test_text" in caplog.text
    build(tmp_path / "other_valid_text", numbered(5), np.int32)
    # data.held_out is held out, and the folder's own `valid` is left alone.
    typed = dataset(tmp_path, f"data.held_out={tmp_path / 'other_valid_text'}")
    assert typed.domains == ("other_text", "wiki_text")
    assert (typed.train_stream.size, typed.heldout_stream.size) == (2000, 250)
    assert (refused(tmp_path / "wiki_test_text", f"data.held_out={tmp_path / 'wiki_test_text'}").id
            == "E-DATA-070")


def test_names_that_are_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("x", "y")):
        (tmp_path / name).mkdir()
        build(tmp_path / name / "text", numbered(30 + number), np.int32)
    assert dataset(f"{tmp_path}/x/text {tmp_path}/y/text").domains == ("x/text", "y/text")


def test_a_blend_that_is_not_understood_is_refused(ab: tuple[Path, Path]) -> None:
    a, b = ab
    for path, why in ((f"0.7 {a} {b.name}", "weight"), (f"0.7 {a} x {b.name}", "no weight"),
                      (f"-1 {a} 1 {a}", "above 0"),
                      (f"{a} {a}", "twice"), (f"1 {a.parent}", "folder"), (f"nan {a}", "above 0")):
        error = refused(path)
        assert error.id == "E-DATA-164" and why in error.why, path
    assert refused(f"0.5 {a} 0.5 {a.parent}/c").id == "E-DATA-070"
    assert refused(f"1 {a}", "data.weights={a: 2}").id == "E-DATA-164"
    assert refused(a, f"data.held_out=1 {a}").id == "E-DATA-164"


def closed(count: int, end_id: int) -> list[list[np.ndarray]]:
    return [[np.append(np.random.default_rng(number).integers(0, 255, 30), end_id)]
            for number in range(count)]


def test_what_documents_end_in_is_compared_with_the_tokenizer(tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path / "eod", closed(40, 255), np.int32)
    error = refused(tmp_path / "eod", "data.tokenizer=bytes")
    assert error.id == "E-DATA-163"
    assert "id 255" in error.why
    assert "256" in error.why
    assert "data.end_token=255" in error.next
    data = dataset(tmp_path / "eod", "data.tokenizer=bytes", "data.end_token=255")
    assert data.tokenizer.end_id == 255
    build(tmp_path / "right", closed(40, 256), np.int32)
    assert not caplog.text
    assert dataset(tmp_path / "right", "data.tokenizer=bytes").tokenizer.end_id == 256
    assert not caplog.text
    assert refused(f"{tmp_path}/eod {tmp_path}/right").id == "E-DATA-163"     # of two trainers
    build(tmp_path / "open", [[document[0][:-1]] for document in closed(40, 0)], np.int32)
    dataset(tmp_path / "open", "data.tokenizer=bytes")
    assert "nothing marks where a document ends" in caplog.text


def test_a_held_out_set_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(tmp_path / name, numbered(30), np.int32)
    assert refused(tmp_path / "a", f"data.held_out={tmp_path / 'b'}").id == "E-DATA-166"
