"""Dataset of a run on all ranks: rank 0 prepares text and reads token files, the others use its result.

    set_up_data        dataset and loader of a training run
    prepare_on_main    text: rank 0 prepares it, all ranks get the folder
    open_on_ranks      open the dataset on all ranks, or on none
"""

from pathlib import Path

from moetrain.comm.agreement import all_or_none, from_first, on_first, told_by_first
from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config
from moetrain.data.batches.batch import Dataset
from moetrain.data.batches.denoising import DenoisedDataset
from moetrain.data.loader import TOKEN_FILES, Loader, build_dataset
from moetrain.data.preparation.by_fingerprint import prepared_place
from moetrain.data.preparation.prepare import prepare_from_config
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.train.loggers.prepare_progress import Preparing


def set_up_data(config: Config, directory: Path, mesh: Mesh) -> tuple[Dataset, Loader]:
    """Open the dataset of a run and build this rank's loader. Collective: rank 0 prepares the data.

    Args:
        config: the config of the run.
        directory: directory of the run.
        mesh: all ranks.

    Returns:
        The dataset, and the loader of this rank's micro-batches.
    """
    dataset, batch = (
        open_on_ranks(config, directory, mesh, prepare_on_main(config, directory, mesh)), mesh["batch"])
    if config.denoising.rates:
        dataset = DenoisedDataset(dataset, rates=config.denoising.rates, seq_len=config.train.seq_len,
                                  seed=config.data_seed)
    return dataset, Loader(dataset, global_batch=config.train.global_batch,
                           micro_batch=config.train.per_forward(batch.size), rank=batch.position,
                           ranks=batch.size)


def prepare_on_main(config: Config, directory: Path, mesh: Mesh, *, tokenizer: Tokenizer | None = None,
                    expected: str | None = None) -> Path | None:
    """Prepare the text of `data=text` on rank 0, while the other ranks wait. Collective.

    If the preparation fails, all ranks exit with its code.

    Args:
        config: the config of the run.
        directory: directory of the run; holds the prepared text unless `data.cache` names a folder.
        mesh: all ranks.
        tokenizer: used in place of `data.tokenizer`.
        expected: required fingerprint; nothing is written if the data has another one.

    Returns:
        The folder of the prepared text, on all ranks; None for other kinds of data.
    """
    if config.data.kind != "text":
        return None

    def prepared() -> Path:
        with Preparing(bar=config.log.progress) as progress:
            return prepare_from_config(config, directory, progress, tokenizer=tokenizer, expected=expected,
                                       remind=False)

    return from_first(mesh["batch"], prepared)


def open_on_ranks(config: Config, directory: Path, mesh: Mesh, prepared: Path | None, *,
                  trains: bool = True) -> Dataset:
    """Open the dataset of a config on all ranks, or on none. Collective.

    Token files of other programs are read whole by rank 0 alone. The other ranks wait, then open the files by
    the indexes that rank 0 has written (data/pretokenized/token_indexes.py).

    Args:
        config: the config of the run.
        directory: directory of the run.
        mesh: all ranks.
        prepared: result of `prepare_on_main`.
        trains: whether training windows are needed.

    Returns:
        The dataset.

    Raises:
        DataError: the data cannot be used, or has changed since rank 0 read it.
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
    fingerprint = told_by_first(batch, None if first is None else first.fingerprint)
    return all_or_none(
        batch, lambda: first or _same(opened(TokenIndexes(folder, use="take")), fingerprint, folder))


def _same(dataset: Dataset, fingerprint: str | None, folder: Path) -> Dataset:
    """Return the dataset if it has the fingerprint that rank 0 found."""
    if dataset.fingerprint != fingerprint:
        raise DataError(122, "a token file was changed while it was in use", where=str(folder),
                        why="its index was made again after rank 0 had read it",
                        next="the same command, when nothing writes to the data")
    return dataset
