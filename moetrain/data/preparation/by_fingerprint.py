"""Look-up of prepared data by fingerprint, so that what a checkpoint names is found without its source.

A dataset folder is named after the fingerprint of its content, so it is the same data wherever it lies.
"""

from collections.abc import Iterable
from pathlib import Path

from moetrain.config.schema import DataConfig
from moetrain.data.preparation.prepared_dataset import DESCRIPTION, Prepared, open_prepared
from moetrain.errors import DataError

NAME_LENGTH = 16                 # hex digits of the fingerprint in a folder's name


def prepared_place(data: DataConfig, run_dir: Path) -> Path:
    """Folder in which a run keeps prepared datasets and indexes of token files."""
    return Path(data.cache) if data.cache else run_dir / "data"


def find_prepared(fingerprint: str, places: Iterable[Path]) -> Prepared | None:
    """The dataset with a fingerprint: one of the places, or a folder in one. None if it is in none of them.

    DataError if only a damaged one is found.
    """
    failure = None
    for place in places:
        for folder in (place / fingerprint[:NAME_LENGTH], place):
            if not (folder / DESCRIPTION).is_file():
                continue
            try:
                found = open_prepared(folder, verify=False)
            except DataError as error:
                failure = failure or error
                continue
            if found.fingerprint == fingerprint:
                return found
    if failure is not None:
        raise failure
    return None
