"""The dataset of a run on all ranks:

rank 0 prepares text and reads token files, the others take what it has found.
"""

from pathlib import Path

from moetrain.comm.agreement import all_or_none, from_first, on_first, told_by_first
from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config
from moetrain.data.batches.batch import Dataset
from moetrain.data.loader import TOKEN_FILES, Loader, build_dataset
from moetrain.data.preparation.by_fingerprint import prepared_place
from moetrain.data.preparation.prepare import prepare_from_config
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.train.loggers.prepare_progress import Preparing


def set_up_data(config: Config, directory: Path, mesh: Mesh) -> tuple[Dataset, Loader]:
    """The dataset of a run and this rank's loader. Collective: rank 0 prepares the data."""
    dataset, batch = open_on_ranks(config, directory, mesh, prepare_on_main(config, directory, mesh)), mesh["batch"]
    return dataset, Loader(dataset, global_batch=config.train.global_batch, micro_batch=config.train.per_forward(batch.size),
                           rank=batch.position, ranks=batch.size)


def prepare_on_main(config: Config, directory: Path, mesh: Mesh, *, tokenizer: Tokenizer | None = None,
                    expected: str | None = None) -> Path | None:
    """Rank 0 prepares the text; the others wait and are told where it lies, or leave with it.

    tokenizer, expected: see prepare_from_config.
    """
    if config.data.kind != "text":
        return None

    def prepared() -> Path:
        with Preparing(bar=config.log.progress) as progress:
            return prepare_from_config(config, directory, progress, tokenizer=tokenizer, expected=expected, remind=False)

    return from_first(mesh["batch"], prepared)


def open_on_ranks(config: Config, directory: Path, mesh: Mesh, prepared: Path | None, *, trains: bool = True) -> Dataset:
    """The dataset of a config, on all ranks or on none. Collective.

    Files of another program are read whole by rank 0 alone; the others wait, and take what it has found
    (data/pretokenized/token_indexes.py).

    prepared, trains: see build_dataset.
    """
    batch = mesh["batch"]

    def opened(indexes: TokenIndexes) -> Dataset:
        return build_dataset(config, directory, prepared, trains=trains, indexes=indexes)

    if config.data.kind not in TOKEN_FILES:
        return all_or_none(batch, lambda: opened(TokenIndexes()))
    folder = prepared_place(config.data, directory)

    def read() -> Dataset:
        with Preparing(bar=config.log.progress) as progress:
            return opened(TokenIndexes(folder, use="keep" if batch.size == 1 else "share", progress=progress))

    first = on_first(batch, read)
    fingerprint = told_by_first(batch, first and first.fingerprint)
    return all_or_none(batch, lambda: first or _same(opened(TokenIndexes(folder, use="take")), fingerprint, folder))


def _same(dataset: Dataset, fingerprint: str | None, folder: Path) -> Dataset:
    if dataset.fingerprint != fingerprint:
        raise DataError(122, "a token file was changed while it was in use", where=str(folder),
                        why="its index was made again after rank 0 had read it",
                        next="the same command, when nothing writes to the data")
    return dataset
