"""What a run has trained, to look at: the model of its newest good checkpoint, its tokenizer and its data.

    load_trained        the model; the manifest of its checkpoint says what it was trained on
    trained_tokenizer   reads and writes its text
    trained_dataset     what it was trained on and what it held out

Data and tokenizer are those that the checkpoint names by fingerprint. They are looked for where the run keeps prepared data:
<run.dir>/data and data.cache. What lies at data.path now is neither read nor believed; only where the prepared folder is gone is it
made again from there, and refused where it is not the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.checkpoint.manifest import newest
from moetrain.checkpoint.records import Manifest
from moetrain.comm.agreement import all_or_none, from_first
from moetrain.comm.mesh import Mesh
from moetrain.config.compose import run_dir
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.schema import Config
from moetrain.data.batches.batch import Dataset
from moetrain.data.loader import build_dataset
from moetrain.data.preparation.by_fingerprint import NAME_LENGTH, find_prepared, prepared_place
from moetrain.data.preparation.prepare import other_data
from moetrain.data.preparation.prepared_dataset import open_prepared
from moetrain.data.pretokenized.end_token import open_tokenizer
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.data.tokenizers.tokenizer import Tokenizer, configured_tokenizer, load_tokenizer
from moetrain.errors import CheckpointError, DataError
from moetrain.files import nearby, shown
from moetrain.model.build import build_model
from moetrain.model.transformer import Transformer
from moetrain.runs.completion import trained_config
from moetrain.train.checkpoint.load import load_newest_model, newest_manifest, other_model
from moetrain.train.data_setup import open_on_ranks, prepare_on_main
from moetrain.train.setup import join

_EMBEDDING = "model.embed"
_PREPARED = ("text", "tokens")       # kinds of data that lie in a prepared folder
_LOOKED_AT = 256                     # documents
# What is wrong with a source that has moved, or is empty now.
_GONE = ("E-DATA-010", "E-DATA-020", "E-DATA-030", "E-DATA-032")


class Trained(NamedTuple):
    """A model and where it came from.

    config: what was asked for, with the data that the model was trained on.
    places: where prepared data of the run may lie.
    """

    model: Transformer
    mesh: Mesh
    config: Config
    directory: Path
    manifest: Manifest
    places: tuple[Path, ...]

    @property
    def step(self) -> int:
        return self.manifest.values["step"]

    @property
    def fingerprint(self) -> str:
        """Of the data that it was trained on."""
        return str(self.manifest.facts.get("data"))


def load_trained(config: Config, typed: frozenset[str] = frozenset()) -> Trained:
    """The newest good checkpoint of a run, in evaluation mode. Collective.

    typed: the keys that were set on top of the run's own config; its `data` may be of other data then.
    """
    directory = run_dir(config)
    if newest(directory) is None:
        raise CheckpointError(
            2, "the run has no checkpoint yet", where=str(directory / "checkpoints"),
            why="a run saves at its end and every checkpoint.interval steps", next="the command that trains the run; it saves at run.stop_at, too",
        )
    mesh = join(config)
    vocab_size = all_or_none(mesh["batch"], lambda: _vocabulary(directory))
    model = build_model(config, vocab_size, mesh)
    found = load_newest_model(model, directory, mesh, verify=config.checkpoint.verify)
    model.eval()
    own = as_trained(config, trained_config(directory, found.path), typed)
    named = (config.data.cache, own.data.cache, own.data.path if own.data.kind == "tokens" else None)
    places = tuple(dict.fromkeys([directory / "data", *(Path(path) for path in named if path)]))
    return Trained(model, mesh, own, directory, found.manifest, places)


def as_trained(config: Config, trained: Config, typed: frozenset[str]) -> Config:
    """A config with the data of another, the run's own. Of `data` it keeps the place of prepared data, and a mask that was typed."""
    mask = trained.data.mask_documents if "data" in typed and "data.mask_documents" not in typed else config.data.mask_documents
    data = replace(trained.data, mask_documents=mask, overlap=config.data.overlap, cache=config.data.cache or trained.data.cache)
    return replace(config, data=data, run=replace(config.run, seed=trained.run.seed))


def _vocabulary(directory: Path) -> int:
    entry = newest_manifest(directory).entry(_EMBEDDING)
    if entry is None or len(entry.shape) != 2:
        raise other_model(directory / "checkpoints", [f"{_EMBEDDING} is not in the checkpoint"])
    return entry.shape[0]


def trained_tokenizer(run: Trained) -> Tokenizer | None:
    """The tokenizer that the model was trained with; None where its ids stand for no text. Collective."""
    if run.config.data.kind not in _PREPARED:
        return getattr(trained_dataset(run), "tokenizer", None)
    return all_or_none(run.mesh["batch"], lambda: _tokenizer(run))


def _tokenizer(run: Trained) -> Tokenizer | None:
    data, named = run.config.data, run.manifest.facts.get("tokenizer")
    if named == "bytes":
        return load_tokenizer("bytes")
    if (found := find_prepared(run.fingerprint, run.places)) is not None:
        return found.tokenizer
    if data.kind != "text" or named is None:
        raise _missing(run, "the tokenizer lies with the data")
    try:
        tokenizer = configured_tokenizer(data)
    except DataError as error:
        raise _missing(run, f"{error.what}: {error.where}") from error
    check_tokenizer(tokenizer, str(named), data.tokenizer)
    return tokenizer


class Writing(NamedTuple):
    """What a text is written with. end_id: ends a document, and begins the next; None where the run has seen no such id."""

    tokenizer: Tokenizer
    end_id: int | None


def writing(run: Trained, config: Config, typed: frozenset[str]) -> Writing:
    """What to generate with: the run's own tokenizer, or for a run on ids alone one that was typed. Collective.

    DataError where there is none, or where something was typed that generation does not read and that is not the run's own.
    """
    read = {"data.tokenizer", "data.cache", "data.mask_documents"}
    read |= {"data.end_token", "data.parse_special"} if "data.tokenizer" in typed else set()
    beside = {key for key in typed if key == "data" or key.startswith("data.")} - read
    asked, own_data = (with_absolute_paths(one).data for one in (config, run.config))
    fields = {key: key.split(".")[1] if "." in key else "kind" for key in beside}
    beside = {key for key, field in fields.items() if getattr(asked, field) != getattr(own_data, field)}
    if beside:
        raise DataError(178, f"{', '.join(sorted(beside))} with generate", where="the command line",
                        why="a text is continued with the tokenizer that the run was trained with, and reads no data",
                        next=f"leave {' and '.join(sorted(beside))} out")
    data, dataset = config.data, None
    if run.config.data.kind in _PREPARED:
        own = chosen = trained_tokenizer(run)
        if "data.tokenizer" in typed:
            chosen = configured_tokenizer(data)
    else:
        dataset = trained_dataset(run)
        own = chosen = getattr(dataset, "tokenizer", None)
        if "data.tokenizer" in typed:
            chosen, _ = open_tokenizer(data.tokenizer, data.end_token)
    if chosen is None:
        raise no_text(run, "there is no tokenizer to write with", "train with data=text, or give data.tokenizer")
    if own is not None:
        check_tokenizer(chosen, own.identity, data.tokenizer)
    else:
        refuse_more_ids(run, chosen.vocab_size, f"{shown(data.tokenizer)} (data.tokenizer)")
    return Writing(chosen, chosen.end_id if dataset is None or _ends_in(dataset, chosen.end_id) else None)


def _ends_in(dataset: Dataset, end_id: int) -> bool:
    """Whether documents of tokens that another program wrote end in this id: some of them do not."""
    stream = dataset.train_stream
    ends = np.append(stream.document_starts[1:], stream.size)
    return any(int(stream.read(int(end) - 1, 1)[0]) == end_id for end in ends[:_LOOKED_AT].tolist())


def no_text(run: Trained, why: str, next: str) -> DataError:
    return DataError(173, "the run was trained on tokens that stand for no text", where=nearby(run.directory), why=why, next=next)


def refuse_more_ids(run: Trained, vocab_size: int, where: str) -> None:
    """DataError where there are ids that the model does not have."""
    trained = run.model.embed.shape[0]
    if vocab_size > trained:
        raise DataError(175, "there are more ids than the model has", where=where,
                        why=f"the vocabulary has {vocab_size:,} ids, the model's {trained:,}",
                        next="leave it out, or give that of the tokenizer that the run was trained with")


def check_tokenizer(tokenizer: Tokenizer, trained: str, path: str) -> None:
    """DataError where a tokenizer is not the one that the run was trained with."""
    if tokenizer.identity != trained:
        raise DataError(172, "the tokenizer is not the one that the run was trained with", where=f"{shown(path)} (data.tokenizer)",
                        why=f"it is {tokenizer.identity[:32]}, the run's is {trained[:32]}: the same ids stand for other text",
                        next="leave data.tokenizer out, or restore the file")


def trained_dataset(run: Trained) -> Dataset:
    """What the run was trained on, and what it held out. Collective."""
    folder = None
    if run.config.data.kind in _PREPARED:
        folder = from_first(run.mesh["batch"], lambda: _folder(run))
        if folder is None:
            folder = _prepared_again(run)
    dataset = open_on_ranks(_with_path(run.config, folder), run.directory, run.mesh, folder)
    return all_or_none(run.mesh["batch"], lambda: _as_trained(run, dataset))


def open_trained(run: Trained) -> Dataset | None:
    """The same on one rank alone; None where it is not there."""
    folder = _folder(run)
    if folder is None and run.config.data.kind in _PREPARED:
        return None
    indexes = TokenIndexes(prepared_place(run.config.data, run.directory), use="keep")
    return _as_trained(run, build_dataset(_with_path(run.config, folder), run.directory, folder, indexes=indexes))


def _folder(run: Trained) -> Path | None:
    found = find_prepared(run.fingerprint, run.places)
    return found and found.folder


def _prepared_again(run: Trained) -> Path:
    data = run.config.data
    try:
        if data.kind == "tokens":
            raise other_data(data.path, open_prepared(Path(str(data.path)), verify=False).fingerprint, run.fingerprint)
        return prepare_on_main(run.config, run.directory, run.mesh, expected=run.fingerprint)
    except DataError as error:
        if error.id not in _GONE:
            raise
        raise _missing(run, f"{error.what}: {error.where}") from error


def _missing(run: Trained, why: str) -> DataError:
    return DataError(170, "the data that the run was trained on is not there", where=", ".join(nearby(place) for place in run.places),
                     why=f"there is no prepared folder {run.fingerprint[:NAME_LENGTH]} in them; {why}",
                     next=f"data.cache=<the folder that holds {run.fingerprint[:NAME_LENGTH]}>, or restore what the run was trained on")


def _with_path(config: Config, folder: Path | None) -> Config:
    """Prepared tokens are where they were found now."""
    return replace(config, data=replace(config.data, path=str(folder))) if config.data.kind == "tokens" else config


def _as_trained(run: Trained, dataset: Dataset) -> Dataset:
    if dataset.fingerprint != run.fingerprint:
        raise other_data(run.config.data.path, dataset.fingerprint, run.fingerprint)
    return dataset
