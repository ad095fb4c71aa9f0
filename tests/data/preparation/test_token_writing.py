"""Texts to shards with each kind of tokenizer: documents come back, every byte of held-out text counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from moetrain.data.batches.batch import padding
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.preparation import prepared_dataset as prepared_module
from moetrain.data.preparation.prepare import prepare
from moetrain.data.preparation.prepared_dataset import Prepared, open_prepared, write_description
from moetrain.data.preparation.split_writer import SplitWriter
from moetrain.errors import DataError
from tests.support.tokenizers import KINDS, prose, saved

TEXT = "\u5b57\U0001f600e\u0301\ufb01 "


def corpus(folder: Path) -> list[bytes]:
    """Documents of two domains: prose, undecodable bytes, texts of which a tokenizer drops something."""
    texts = [prose(number, 40 + number).encode() for number in range(40)]
    texts += [f"{number} ".encode() + TEXT.encode() * 30 + b"caf\xe9\xe5\xad \xff" * (number % 3) + b" \n\n"
              for number in range(30)]
    for number, text in enumerate(texts):
        path = folder / ("prose" if number < 40 else "odd") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return texts


def made(tmp_path: Path, kind: str, **more: object) -> tuple[Prepared, list[bytes]]:
    texts = corpus(tmp_path / "in")
    tokenizer = "bytes" if kind == "bytes" else str(saved(kind, tmp_path / "tokenizer.json"))
    folder = prepare(path=str(tmp_path / "in"), out=tmp_path / "out", tokenizer=tokenizer, **more)
    return open_prepared(folder, verify=True), texts


def documents(prepared: Prepared, split: str) -> list[tuple[int, int]]:
    """(first token, tokens) of every document."""
    stream = getattr(prepared, split)
    starts = [*stream.document_starts.tolist(), stream.size]
    return [(begin, end - begin) for begin, end in zip(starts, starts[1:])]


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_every_byte_of_held_out_text_is_one_tokens(tmp_path: Path, kind: str) -> None:
    prepared, texts = made(tmp_path, kind, held_out_share=0.3)
    stream = prepared.heldout
    sizes = [stream.text_bytes(*document) for document in documents(prepared, "heldout")]
    assert sum(sizes) == sum(counts["bytes"] for counts in prepared.description["heldout"].values())
    assert set(sizes) <= set(map(len, texts)) and len(sizes) > 5
    for length in (1, 7, 64):
        parts = [stream.text_bytes(start, min(length, stream.size - start))
                 for start in range(0, stream.size, length)]
        assert sum(parts) == sum(sizes) and min(parts) >= 0
    assert (prepared.train.text_bytes(0, 1) is None) == (kind != "bytes")


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_the_targets_of_all_windows_cover_the_held_out_text(tmp_path: Path, kind: str) -> None:
    """For every tokenizer, length of a window and batch: what nats per byte are divided by."""
    prepared, _ = made(tmp_path, kind, held_out_share=0.3)
    text = sum(counts["bytes"] for counts in prepared.description["heldout"].values())
    for seq_len, batch in ((16, 5), (33, 64)):
        data = TokenDataset(prepared=prepared, seq_len=seq_len, global_batch=2, seed=0)
        covered = [data.bytes_of_targets(found) for part in range(len(data.measured))
                   for found in data.heldout(part, windows=1 << 20, batch=batch)]
        assert sum(covered) == text and len(covered) > 1
    alone = [data.bytes_of_targets(data.batch(data.heldout_ids(part, 1 << 20)[number:number + 1]))
             for part in range(len(data.measured))
             for number in range(len(data.heldout_ids(part, 1 << 20)))]
    assert sum(alone) == text and data.bytes_of_targets(padding(3, seq_len, mask_documents=False)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_what_the_library_makes_of_them(tmp_path: Path, kind: str) -> None:
    prepared, texts = made(tmp_path, kind)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = sorted([*library.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids,
                       prepared.tokenizer.end_id]
                      for text in texts)
    found = sorted(getattr(prepared, split).read(*document).tolist() for split in ("train", "heldout")
                   for document in documents(prepared, split))
    assert found == expected


def test_special_strings_are_counted_where_they_are_parsed(tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    for number in range(30):
        (tmp_path / "in").mkdir(exist_ok=True)
        special = "<|endoftext|> and </s>" if number % 3 == 0 else ""
        (tmp_path / "in" / f"{number}.txt").write_text(prose(number, 30) + special)
    tokenizer = str(saved("byte-level BPE", tmp_path / "tokenizer.json"))
    with caplog.at_level("INFO"):
        parsed, plain = (open_prepared(prepare(path=str(tmp_path / "in"), out=tmp_path / "out",
                                               tokenizer=tokenizer, parse_special=parse),
                                       verify=True) for parse in (True, False))
    assert parsed.description["special_tokens"] == 20 and plain.description["special_tokens"] is None
    assert parsed.fingerprint != plain.fingerprint
    assert [record.message for record in caplog.records
            if "20 special tokens inside documents" in record.message]
    ends = [int((np.concatenate([data.train.read(0, data.train.size),
                                 data.heldout.read(0, data.heldout.size)])
                 == data.description["end_id"]).sum()) for data in (parsed, plain)]
    assert ends == [40, 30]


def in_small_shards(folder: Path) -> tuple[Prepared, np.ndarray]:
    """A dataset of several shards, and the sizes of its held-out tokens."""
    chance = np.random.default_rng(0)
    folder.mkdir()
    expected: list[np.ndarray] = []
    counts = {}
    for split in ("train", "heldout"):
        writer = SplitWriter(folder=folder, split=split, vocab_size=500, domains=("a", "b"), shard_tokens=64,
                             sizes=split == "heldout")
        for domain in (0, 1):
            for length in (3, 30, 40, 150, 64, 1, 63):
                sizes = chance.integers(0, 1 << 20, length)
                for part in (slice(0, length // 2), slice(length // 2, None)):
                    writer.extend(chance.integers(0, 500, length)[part], domain, sizes[part])
                writer.end_document(domain, int(sizes.sum()))
                expected += [sizes] if split == "heldout" else []
        writer.flush()
        counts[split] = writer.counts
    write_description(folder, {"fingerprint": "f", "tokenizer": "other", "vocab_size": 500, "end_id": 0,
                               "domains": ["a", "b"], "heldout_overlap": None, **counts})
    return open_prepared(folder, verify=True), np.concatenate(expected)


def test_sizes_lie_beside_their_tokens(tmp_path: Path) -> None:
    prepared, sizes = in_small_shards(tmp_path / "data")
    stream = prepared.heldout
    assert len(prepared.description["sizes"]) > 3 and stream.size == len(sizes)
    assert [stream.text_bytes(start, 1) for start in range(len(sizes))] == sizes.tolist()
    assert stream.text_bytes(10, 200) == sizes[10:210].sum() and stream.text_bytes(7, 0) == 0


def test_sizes_are_checked_like_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    names = sorted(in_small_shards(folder)[0].description["sizes"])
    path = folder / names[0]
    whole = path.read_bytes()
    for content, number in ((whole[:-5] + b"\1" + whole[-4:], 7), (whole[:-4], 6),
                            ((folder / names[1]).read_bytes(), 12),
                            ((folder / "heldout-00000.tokens").read_bytes(), 12), (b"", 2)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"E-DATA-{number:03d}") as caught:
            open_prepared(folder, verify=True)
        assert str(path) in caught.value.where
    path.unlink()
    with pytest.raises(DataError, match="E-DATA-001"):
        open_prepared(folder, verify=False)


def test_sizes_of_other_documents_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepared, _ = in_small_shards(folder)
    first, second = sorted(prepared.description["sizes"])[:2]
    contents = [(folder / name).read_bytes() for name in (second, first)]
    for name, content in zip((first, second), contents):
        (folder / name).write_bytes(content)
    (folder / "dataset.json").unlink()
    write_description(folder, {name: value for name, value in prepared.description.items()
                               if name not in ("format", "shards", "sizes")})
    with pytest.raises(DataError, match="E-DATA-012"):
        open_prepared(folder, verify=False)


@pytest.mark.parametrize("sizes", [[], {"../x.sizes": 1}, {"heldout-00000.sizes": 1, "train-00000.sizes": 1},
                                   {"a.sizes": 3}])
def test_a_description_with_other_sizes_is_damaged(tmp_path: Path, sizes: object) -> None:
    prepared, _ = made(tmp_path, "WordPiece")
    path = prepared.folder / "dataset.json"
    content = json.loads(path.read_text()) | {"sizes": sizes}
    content.pop("checksum")
    content["checksum"] = prepared_module._checksum(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="E-DATA-011"):
        open_prepared(prepared.folder, verify=False)


def test_ids_that_nobody_can_read_have_no_bytes(tmp_path: Path) -> None:
    """A dataset that was prepared before sizes were kept."""
    prepared, _ = made(tmp_path, "WordPiece")
    path = prepared.folder / "dataset.json"
    content = json.loads(path.read_text())
    for name in [*content.pop("sizes"), "checksum"]:
        (prepared.folder / name).unlink() if name != "checksum" else content.pop(name)
    content["checksum"] = prepared_module._checksum(content)
    path.write_text(json.dumps(content))
    assert open_prepared(prepared.folder, verify=True).heldout.text_bytes(0, 3) is None
