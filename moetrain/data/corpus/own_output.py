"""Recognition of moetrain's own output: runs, prepared data, indexes of token files and killed preparations.

A folder of text is a reasonable place to work in, so `data.path=.` must not read the runs below it.
"""

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from moetrain.data.tokens import index_file as token_index_file
from moetrain.data.tokens.shards import MAGIC
from moetrain.files import open_regular

_SHARD = re.compile(r"(train|heldout)-\d{5}\.(tokens|sizes)")
_STEP = re.compile(r"step-\d{8}")
_DATASET = re.compile(r"[0-9a-f]{16}")
_INDEX = re.compile(rf"[0-9a-f]{{16}}\{token_index_file.SUFFIX}")
_JOB_LOG = re.compile(r"moetrain-\d+\.log")  # written by launch/slurm.sbatch to the folder of sbatch
_RUN_FILES = frozenset(("config.yaml", "env.json", "eval.jsonl", "loads.npz", "lock", "metrics.jsonl",
                        "specialisation.npz", "status.json"))
_RUN_FOLDERS = frozenset(("checkpoints", "data", "log", "report", "wandb"))
_DATASET_FILES = frozenset(("dataset.json", "tokenizer.json"))


def is_own(folder: str, folders: Collection[str], names: Collection[str]) -> bool:
    """Whether a folder with these subfolders and files is a run, a dataset or an unfinished dataset."""
    return (os.path.basename(folder).startswith(".preparing-") or _is_run(folder, folders, names)
            or _is_dataset(folder, names))


def own_parts(folder: str, folders: Collection[str], names: Collection[str]) -> tuple[set[str], set[str]]:
    """Own output inside a folder that is otherwise read.

    That is the folder which the user named, or one that contains datasets.

    Returns:
        Names of folders and names of files to leave out.
    """
    own_folders, own_files = set(), set(filter(_JOB_LOG.fullmatch, names))
    if _is_run(folder, folders, names):
        own_folders |= _RUN_FOLDERS.intersection(folders)
        own_files |= {name for name in names if name in _RUN_FILES or name.endswith(".lost")}
    if _is_dataset(folder, names):
        own_files |= {name for name in names if name in _DATASET_FILES or _SHARD.fullmatch(name)}
    own_files |= {name for name in names if _INDEX.fullmatch(name)
                  and _starts_with(folder, name, token_index_file.MAGIC)}
    if "sources.json" in names and any(os.path.isfile(os.path.join(folder, name, "dataset.json"))
                                       for name in folders if _DATASET.fullmatch(name)):
        own_files.add("sources.json")
    return own_folders, own_files


def _is_run(folder: str, folders: Collection[str], names: Collection[str]) -> bool:
    """Whether a folder is a run. Runs write log/attempts.jsonl first, and may be copied without logs."""
    if "log" in folders and os.path.isfile(os.path.join(folder, "log", "attempts.jsonl")):
        return True
    if "config.yaml" not in names:
        return False
    return {"metrics.jsonl", "env.json"} <= set(names) or "checkpoints" in folders and any(
        map(_STEP.fullmatch, _listed(os.path.join(folder, "checkpoints"))))


def _is_dataset(folder: str, names: Collection[str]) -> bool:
    shard = next((name for name in names if _SHARD.fullmatch(name) and name.endswith(".tokens")), None)
    return shard is not None and _starts_with(folder, shard, MAGIC)


def _starts_with(folder: str, name: str, magic: bytes) -> bool:
    with suppress(OSError), open_regular(Path(folder, name)) as file:
        return file.read(len(magic)) == magic
    return False


def _listed(folder: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)
    return []
