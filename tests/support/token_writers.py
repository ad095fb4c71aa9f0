"""Token files as other trainers write them, with NumPy alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

GPT_2, LLAMA_3 = (20240520, 1, np.uint16), (20240801, 7, np.uint32)


def nanogpt(path: Path, ids: np.ndarray) -> None:
    """Write uint16 without a header, as karpathy/nanoGPT does.

    data/openwebtext/prepare.py and data/shakespeare_char/prepare.py.
    """
    written = np.memmap(path, dtype=np.uint16, mode="w+", shape=(len(ids),))
    written[:] = ids
    written.flush()


def llmc(path: Path, ids: np.ndarray, kind: tuple[int, int, type] = GPT_2) -> None:
    """Write as write_datafile of karpathy/llm.c does (dev/data/data_common.py).

    KellerJordan/modded-nanogpt reads the first kind.
    """
    magic, version, dtype = kind
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1], header[2] = magic, version, len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())


def olmo(path: Path, ids: np.ndarray, dtype: type = np.uint16) -> None:
    """Write a memory map that is named .npy and has no header, as allenai/dolma does.

    python/dolma/tokenizer/memmap_writer.py.
    """
    written = np.memmap(filename=path, dtype=dtype, mode="w+", shape=(len(ids),))
    written[:] = ids
    written.flush()


def end_of_documents(documents: list[np.ndarray], end_id: int) -> np.ndarray:
    """Documents end to end, an end token behind each."""
    return np.concatenate([np.append(document, end_id) for document in documents])


Writer = Callable[[Path, np.ndarray], None]
# By name: who writes it, the suffix, and a vocabulary that it is used with.
WRITERS: dict[str, tuple[Writer, str, int]] = {
    "nanoGPT": (nanogpt, ".bin", 50257),
    "llm.c GPT-2": (llmc, ".bin", 50257),
    "llm.c Llama 3": (lambda path, ids: llmc(path, ids, LLAMA_3), ".bin", 128_256),
    "OLMo": (olmo, ".npy", 50280),
    "OLMo 2": (lambda path, ids: olmo(path, ids, np.uint32), ".npy", 100_278),
    "numpy": (lambda path, ids: np.save(path, ids.astype(np.uint16)), ".npy", 50257),
    "numpy int64": (lambda path, ids: np.save(path, ids), ".npy", 128_256),
}
