"""Formats of token id files written by other trainers, recognized by content.

    llm.c    256 int32: magic, version, number of tokens; then uint16 (magic 20240520) or uint32 (20240801).
             karpathy/llm.c dev/data/data_common.py (write_datafile); KellerJordan/modded-nanogpt trains on
             these files too
    numpy    a .npy with NumPy's own header: one dimension of integers
    raw      ids alone. train.bin of karpathy/nanoGPT (data/openwebtext/prepare.py), and the .npy of OLMo,
             a memory map without a header (allenai/dolma python/dolma/tokenizer/memmap_writer.py)

Nothing in a raw file tells the width of its ids: `pretokenized/memmap.py` compares them with the vocabulary.
Files that hold no ids are recognized as well, so that nobody trains on a text or an archive as if its bytes
were ids.
"""

import os
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple

import numpy as np

from moetrain.files import open_regular

SUFFIXES = (".bin", ".npy")                     # of the token files in a folder
LLMC_HEADER = 1024                              # bytes
_LLMC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}    # by magic: version, dtype of ids
_LLMC_OTHERS = {20240522: "multiple-choice examples of llm.c", 20240326: "a model of llm.c",
                20240327: "a training state of llm.c", 20240328: "a tokenizer of llm.c"}
_INDEX_MAGIC = b"MMIDIDX\0\0"                   # of Megatron-Core's .idx
_SHARD_MAGIC = b"MOETOKEN"
_NPY_MAGIC = b"\x93NUMPY"
_MAGICS = (
    (b"PK\x03\x04", "a zip archive, as .npz and torch.save write them"),
    (b"\x1f\x8b\x08", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard"), (b"\xfd7zXZ\0", "compressed by xz"),
    (b"BZh", "compressed by bzip2"), (b"PAR1", "a Parquet file"), (b"ARROW1", "an Arrow file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"), (b"GGUF", "a GGUF model"),
)
_HEAD = 4096                                    # bytes looked at to recognize a file
_RAW = "raw"
_RAW_BY_SUFFIX = {".bin": "nanoGPT", ".npy": "OLMo"}
_LEAST_TEXT = 32                                # bytes; fewer may look like text by chance


class TokenFormat(NamedTuple):
    """How ids lie in a file.

    Args:
        name: the format.
        start: byte of the first id.
        dtype: type of an id; None where the file does not tell it.
        tokens: number of ids that the header gives; None without a header.
    """

    name: str
    start: int
    dtype: np.dtype | None
    tokens: int | None

    def shown(self, path: Path) -> str:
        """The format as shown to a user. Raw ids are named after the trainer that uses the file's suffix."""
        return self.name if self.name != _RAW else _RAW_BY_SUFFIX.get(path.suffix, "raw ids")


class NotTokensError(ValueError):
    """A file holds no ids that can be read.

    Args:
        what: what the file is instead.
        next: command or setting to use instead.
    """

    def __init__(self, what: str, next: str) -> None:
        super().__init__(what)
        self.what, self.next = what, next


def token_format(path: Path) -> TokenFormat:
    """Format of a file. NotTokensError if it holds no token ids, OSError if it cannot be read."""
    with open_regular(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(_HEAD)
        _refuse_others(path, head)
        if head.startswith(_NPY_MAGIC):
            file.seek(0)
            return _numpy(file)
    if size >= LLMC_HEADER and (found := _llmc(head)):
        return found
    if text := _as_text(head):
        raise NotTokensError(f"it is text, and begins with {text!r}",
                             f"data=text data.path={quote(str(path))}")
    return TokenFormat(_RAW, 0, None, None)


def how_to_read(path: Path) -> str | None:
    """Settings that read what `data=tokens` was given and did not write; None if unknown."""
    shown = quote(str(path))
    try:
        if path.is_dir():
            members = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
            return f"data=memmap data.path={shown}" if members and _is_memmap(members[0]) else None
        found = token_format(path)
    except NotTokensError as error:
        return error.next
    except OSError:
        return None
    return f"data=memmap data.path={shown}" if found.name != _RAW or path.suffix in SUFFIXES else None


def _is_memmap(path: Path) -> bool:
    try:
        return token_format(path) is not None
    except NotTokensError:
        return False


def _refuse_others(path: Path, head: bytes) -> None:
    if head.startswith(_SHARD_MAGIC):
        raise NotTokensError("it is a token shard of data=tokens",
                             f"data=tokens data.path={quote(str(path.parent))}")
    index = path if head.startswith(_INDEX_MAGIC) else path.with_suffix(".idx")
    if path.suffix in (".bin", ".idx") and _starts_with(index, _INDEX_MAGIC):
        raise NotTokensError(f"it is indexed data of Megatron-Core, with {index.name} beside it",
                             f"data=megatron data.path={quote(str(path.with_suffix('')))}")
    for magic, what in _MAGICS:
        if head.startswith(magic):
            raise NotTokensError(f"it is {what}",
                                 "data.path=<a file of token ids>; one that is packed has to be unpacked "
                                 "first")


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _numpy(file: BinaryIO) -> TokenFormat:
    """The header of a .npy, parsed by NumPy's own reader, without pickle."""
    elsewhere = "save the ids as one dimension of integers: numpy.save(path, ids)"
    try:
        first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise NotTokensError(f"it is a .npy file whose header cannot be read: {error}", elsewhere) from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise NotTokensError(f"it is a .npy file of {dtype} in {len(shape)} dimensions", elsewhere)
    return TokenFormat("NumPy .npy", file.tell(), dtype, shape[0])


def _llmc(head: bytes) -> TokenFormat | None:
    magic, version, tokens = np.frombuffer(head[:12], "<i4").tolist()
    if magic in _LLMC_OTHERS:
        raise NotTokensError(f"it holds {_LLMC_OTHERS[magic]}", "data.path=<the .bin of token ids>")
    if magic not in _LLMC:
        return None
    known, dtype = _LLMC[magic]
    if version != known or tokens < 0:
        raise NotTokensError(f"it has the header of llm.c with version {version} (known: {known}) and "
                             f"{tokens:,} tokens",
                             "write the file again with llm.c's dev/data scripts")
    return TokenFormat(f"llm.c version {version}", LLMC_HEADER, dtype, tokens)


def _as_text(head: bytes) -> str | None:
    """The beginning of the file if its bytes are text, else None.

    Text is UTF-8 without control characters. Ids rarely look like it for more than a few bytes.
    """
    if len(head) < _LEAST_TEXT:
        return None
    for cut in range(4):                                     # the last character may be incomplete
        try:
            text = head[:len(head) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        plain = all(char.isprintable() or char in "\t\r\n\f" for char in text)
        return text[:24] if plain else None
    return None
