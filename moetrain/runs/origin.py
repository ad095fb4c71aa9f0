"""What a run keeps of the public folder that its model was imported from, for the way back.

    <run.dir>/huggingface/
        import.json      family, spelling of the names, dtypes
        config.json      as it was, with keys that mean nothing here
        tokenizer.json, generation_config.json, …      whatever the tokenizer and generation consist of
        preserved/       tensors without counterpart, as they were

A run that begins from these weights (`init.from`) keeps the same. Nothing of it is read in training.
"""

import os
import shutil
from pathlib import Path

from moetrain.runs.files import as_disk_error

FOLDER = "huggingface"
RECORD = "import.json"


def origin_of(run_dir: Path) -> Path | None:
    """Find what a run keeps of a public folder; None for a run that comes from none."""
    folder = run_dir / FOLDER
    return folder if (folder / RECORD).is_file() else None


def keep_origin(source: Path, run_dir: Path) -> None:
    """Keep in a run what the run keeps that it begins from. Tensors are linked where the file system can.

    Args:
        source: directory of the run that the weights come from.
        run_dir: directory of the run.
    """
    origin = origin_of(source)
    if origin is None or (run_dir / FOLDER).exists():
        return
    with as_disk_error(run_dir / FOLDER):
        unfinished = run_dir / f"{FOLDER}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(origin, unfinished, copy_function=_link)
        unfinished.rename(run_dir / FOLDER)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)
