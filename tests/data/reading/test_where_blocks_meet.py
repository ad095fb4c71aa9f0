"""Long texts: nothing is lost, doubled or cut where blocks meet, inside a character, a line or a record.

Readers may use blocks of any size. So texts are shifted by a byte at a time past powers of two, and each is
decoded whole by tests/support/prepared_reader.py.
"""

import contextlib
import io
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.cli import data
from tests.support.corpus_files import COMPRESS, Keys, Record, parquet_file, table_file
from tests.support.prepared_reader import StoredDataset, read_dataset

SEPARATOR = "<|endoftext|>"
BLOCKS = (1 << 13, 1 << 16)


def prepared(root: Path, files: dict[str, bytes], *keys: str, encoding: str = "utf-8") -> StoredDataset:
    (root / "in").mkdir()
    for name, content in files.items():
        (root / "in" / name).write_bytes(content)
    (root / "held.txt").write_bytes("held-out text".encode(encoding))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert data.run(["prepare", f"data.path={root / 'in'}", f"data.held_out={root / 'held.txt'}",
                         f"data.cache={root / 'out'}", f"data.encoding={encoding}", "data.overlap=0",
                         *keys]) == 0
    return read_dataset(Path(said.getvalue().splitlines()[-1]))


def trained_on(dataset: StoredDataset) -> list[bytes]:
    return sorted(text for _, text in dataset.texts("train"))


def said_bytes(dataset: StoredDataset) -> int:
    return dataset.description["account"]["text"]["became"]["trained on"]["bytes"]


@pytest.mark.parametrize("encoding, sign", [("utf-8", "\U0001f600"), ("utf-16-le", "\U0001f600"),
                                            ("gb18030", "\u00fc"),
                                            ("shift_jis", "\u5b57"), ("iso2022_jp", "\u5b57"),
                                            ("utf-7", "\u5b57")])
def test_a_character_may_lie_across_two_blocks(tmp_path: Path, encoding: str, sign: str) -> None:
    """Shifted by as many bytes as a character has, so that each of them comes first."""
    texts = ["x" * shift + f"{shift} " + sign * ((1 << 16) // len(sign.encode(encoding)) + 9)
             for shift in range(5)]
    dataset = prepared(tmp_path, {f"{number}.txt": text.encode(encoding)
                                  for number, text in enumerate(texts)}, encoding=encoding)
    assert trained_on(dataset) == sorted(text.encode() for text in texts)
    assert dataset.description["account"]["text"]["undecodable"]["bytes"] == 0


@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_separator_may_lie_across_two_blocks(tmp_path: Path, line: str) -> None:
    """At every place around a power of two; lines that only begin or end like it are text."""
    files, texts = {}, []
    for block in BLOCKS:
        for shift in range(len(SEPARATOR) + 3):
            first = f"{block} {shift} ".ljust(block - shift - len(line), "x") + line
            second = f"{SEPARATOR}{shift} {block}{line} {SEPARATOR}{line}"
            files[f"{block}-{shift}.txt"] = f"{first}{SEPARATOR}{line}{second}".encode()
            texts += [first.encode(), second.encode()]
    assert trained_on(prepared(tmp_path, files, f"data.separator={SEPARATOR}")) == sorted(texts)


@pytest.mark.parametrize("kind", ["JSON", "CSV", "Parquet"])
def test_records_may_be_longer_than_a_block(tmp_path: Path, kind: str) -> None:
    """Escapes, quotes, surrogate pairs and ends of lines lie at every place around powers of two."""
    chance = random.Random(0)
    pieces = ['"', "\\", "\n", "\r\n", ",", "\u5b57", "\U0001f600", "\u2028", "plain words ", "x", "\t", "{",
              "]"]
    texts = ["".join(chance.choice(pieces) for _ in range(size)) + str(size)
             for size in (3, 9_000, 70_000, 150_000)]
    records = [Record(text, None) for text in texts]
    match kind:
        case "JSON":
            content = b"\n".join(json.dumps({"text": text}, ensure_ascii=number % 2 == 0).encode()
                                 for number, text in enumerate(texts))
        case "CSV":
            content = table_file(records, Keys(domain=None), ",", chance).encode()
        case _:
            pytest.importorskip("pyarrow")
            content = parquet_file(records, Keys(domain=None), chance)
    files = {f"{number}.{name or 'plain'}": compress(content)
             for number, (name, compress) in enumerate(COMPRESS.items())}
    dataset = prepared(tmp_path, files, "data.domain_key=null")
    assert trained_on(dataset) == sorted(text.encode() for text in texts)
    assert dataset.description["account"]["text"]["became"]["duplicates"]["bytes"] == 4 * said_bytes(dataset)


@pytest.mark.parametrize("million", [2, pytest.param(100, marks=pytest.mark.full)])
def test_a_huge_document_is_whole(tmp_path: Path, million: int) -> None:
    text = ("\u5b57 and so on, \U0001f600\r\n" * (million * 1_000_000 // 23)).encode() + b"end"
    dataset = prepared(tmp_path, {"book.txt": text, "book.txt.gz": COMPRESS["gzip"](b"another" + text),
                                  "one.txt": b"x"})
    assert (trained_on(dataset) == sorted([text, b"another" + text, b"x"])
            and said_bytes(dataset) == 2 * len(text) + 8)


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "plain words and so on \u5b57\u5178 \u00fcber\n\n" * 9 + "x" * 40
    made.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=330, special_tokens=[SEPARATOR], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return made


def test_tokens_of_long_and_odd_texts_decode_to_them(tmp_path: Path) -> None:
    """By the copy of the tokenizer that lies beside the tokens, special strings inside text included."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    chance = random.Random(1)
    pieces = ["plain words ", "\u5b57", "x", "\n\n", f" {SEPARATOR} ", "\U0001f600", "  ", "\ufeff", "\r\n",
              "\x0b", "e\u0301"]
    texts = ["".join(chance.choice(pieces) for _ in range(size)) + str(size)
             for size in (1, 2, 50, 3_000, 100_000)]
    texts += ["\u5b57" * 360_000, "x" * 1_100_001, SEPARATOR, f"{SEPARATOR}\n", " "]
    files = {f"{number}.txt": text.encode() for number, text in enumerate(texts)}
    dataset = prepared(tmp_path, files, f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    (copy,) = (tmp_path / "out").glob("*/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(copy))
    decoded = [tokenizer.decode(document.ids.tolist(), skip_special_tokens=False).encode()
               for document in dataset.train]
    assert (sorted(decoded) == sorted(text.encode() for text in texts)
            and said_bytes(dataset) == sum(map(len, decoded)))
