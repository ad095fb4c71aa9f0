"""Formats that are not read: files of the programs that write them, each named with its conversion."""

import base64
import gzip
import io
import json
import pickle
import sqlite3
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moetrain.data.account.ledgers import FileEntry, NotText
from moetrain.data.reading.reader import read_file
from moetrain.data.reading.records import Reading
from moetrain.data.reading.spool import Spool


def named(path: Path) -> NotText:
    with Spool(path.parent) as spool, pytest.raises(NotText) as caught:
        list(read_file(path, "own", FileEntry(path.name, 0), Reading(), spool))
    return caught.value


def write(tmp_path: Path, content: bytes, name: str = "a file") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "application/epub+zip" if name == "mimetype" else "content")
    return file.getvalue()


@pytest.mark.parametrize("members, name", [(("a.txt",), "zip"),
                                           (("[Content_Types].xml", "word/document.xml"), "Office"),
                                           (("[Content_Types].xml", "docProps/app.xml", "xl/workbook.xml"),
                                            "Excel"), (("mimetype",), "EPUB"),
                                           (("arr_0.npy",), "npz"), (("model/data.pkl",), "PyTorch")])
def test_archives_of_zip_by_what_they_hold(tmp_path: Path, members: tuple[str, ...], name: str) -> None:
    error = named(write(tmp_path, zipped(*members)))
    assert name in error.format and (f"'{tmp_path}/a file'" in error.convert or name == "PyTorch")


def test_archives_of_tar_compressed_too(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("000.txt"), io.BytesIO())
    for content in (file.getvalue(), gzip.compress(file.getvalue())):
        assert "tar archive" in named(write(tmp_path, content)).format


def test_what_programs_write(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "db").execute("create table t (text)").connection.commit()
    assert "SQLite" in named(tmp_path / "db").format and "sqlite3 -json" in named(tmp_path / "db").convert
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint16))
    assert "data=memmap" in named(tmp_path / "a.npy").convert
    assert "pickle" in named(write(tmp_path, pickle.dumps({"text": ["a"]}))).format
    header = np.zeros(256, "<i4")
    header[:2] = 20240520, 1
    assert "llm.c" in named(write(tmp_path, header.tobytes() + bytes(99), "fineweb_train_000001.bin")).format
    assert ("data=memmap"
            in named(write(tmp_path, np.arange(999, dtype=np.uint16).tobytes(), "train.bin")).convert)
    (tmp_path / "m.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8) + bytes(40))
    assert "data=megatron" in named(tmp_path / "m.idx").convert
    assert f"data=megatron data.path={tmp_path}/m" == named(write(tmp_path, bytes(99), "m.bin")).convert
    assert ("MDS"
            in named(write(tmp_path, struct.pack("<IIII", 1, 16, 20, 30) + b"text",
                           "shard.00000.mds")).format)
    assert ("MDS"
            in named(write(tmp_path, json.dumps({"version": 2, "shards": [{"format": "mds"}]}).encode(),
                           "index.json")).format)


def test_arrow_of_the_datasets_library(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["a", "b"]})
    with (pyarrow.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file,
          pyarrow.ipc.new_stream(file, table.schema) as writer):
        writer.write_table(table)
    with (pyarrow.OSFile(str(tmp_path / "a.feather"), "wb") as file,
          pyarrow.ipc.new_file(file, table.schema) as writer):
        writer.write_table(table)
    assert f"load_from_disk('{tmp_path}')" in named(tmp_path / "data-00000-of-00001.arrow").convert
    command = named(tmp_path / "a.feather").convert
    assert "Arrow IPC" in named(tmp_path / "a.feather").format
    import subprocess
    import sys

    # the advice works
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path)
    with Spool(tmp_path) as spool:
        documents = list(read_file(tmp_path / "text.parquet", "own", FileEntry("a", 0), Reading(), spool))
        assert [b"".join(document.blocks(spool)) for document in documents] == [b"a", b"b"]


def test_tokenizers_are_no_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    assert "tokenizer.json" in named(tmp_path / "tokenizer.json").format
    library.save(str(tmp_path / "one line"), pretty=False)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "one line").read_bytes())
    assert "tokenizer.json" in named(tmp_path / "marked").format
    ranks = b"".join(base64.b64encode(bytes([33 + rank])) + b" %d\n" % rank for rank in range(94))
    assert "tiktoken" in named(write(tmp_path, ranks)).format
    tekken = {"config": {"pattern": "[^\\r\\n\\p{L}]?{1,3}", "num_vocab_tokens": 9, "default_vocab_size": 9},
              "vocab": [{"rank": 0, "token_bytes": "AA=="}]}
    assert "tekken.json" in named(write(tmp_path, json.dumps(tekken, indent=1).encode())).format
    piece = b"\n\x05<unk>\x15\0\0\0\0\x18\2"  # ModelProto.pieces: piece, score, type
    assert ("SentencePiece"
            in named(write(tmp_path, b"\n" + bytes([len(piece)]) + piece
                           + b"\n\x0a\n\x03<s>\x15\0\0\0\0\x18\3")).format)


@pytest.mark.parametrize("head, name", [
    (b"%PDF-1.7\n", "PDF"), (b"\x89PNG\r\n\x1a\n", "image"), (b"\xff\xd8\xff\xe0\0\x10JFIF", "image"),
    (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
    (b"{\\rtf1\\ansi", "RTF"), (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office"),
    (b"\x7fELF\2\1\1\0", "program"), (b"Obj\1\4", "Avro"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "Git LFS"),
    (b"Rar!\x1a\x07\1\0", "RAR"),
    (b"ORC\n\x0b\n\3\0\0\0\x12\4", "ORC"), (b"\x04\x22\x4d\x18d@", "lz4"),
    (b"RIFF\x24\x08\0\0WAVEfmt ", "audio"), (b"GGUF\3\0\0\0", "GGUF"),
    (b"WARC/1.0\r\nWARC-Type: conversion\r\n", "WARC"),
    (gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "compressed file in a")])
def test_formats_by_their_first_bytes(tmp_path: Path, head: bytes, name: str) -> None:
    assert name in named(write(tmp_path, head if head[:2] == b"\x1f\x8b" else head + b"more of it")).format


@pytest.mark.parametrize("text", ["ORC\nis a beast\n", "MZ is how programs begin\n", "BMW cars\n",
                                  "ID3 tags\n", "xxx ftyp\n", "RIFF and WAVE\n", "PK\n",
                                  "BZh91AY is how bzip2 begins\n", "LZIP\n", "\n\nOnce upon\n",
                                  "GIF87 and so on\n"])
def test_prose_that_begins_like_a_format_is_text(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text.encode() * 3)
    with Spool(tmp_path) as spool:
        (document,) = read_file(path, "own", FileEntry("a", 0), Reading(), spool)
        assert b"".join(document.blocks(spool)) == text.encode() * 3
