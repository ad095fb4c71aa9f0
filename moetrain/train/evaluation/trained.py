"""A trained model for evaluation and generation: its newest sound checkpoint, its tokenizer and its data.

    load_trained        the model; the manifest of its checkpoint says what it was trained on
    recorded_run        a checkpoint's run without its model
    trained_tokenizer   the tokenizer that reads and writes its text
    trained_dataset     the data that it was trained on, and what was held out

The checkpoint names data and tokenizer by fingerprint. They are searched where the run keeps prepared data,
in <run.dir>/data and data.cache. What lies at data.path now is not read. Only where the prepared folder is
gone is it prepared again from there, and refused if its fingerprint differs.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from moetrain.checkpoint.manifest import newest, read_manifest
from moetrain.checkpoint.records import Manifest
from moetrain.comm.agreement import all_or_none, from_first
from moetrain.comm.mesh import Mesh
from moetrain.config.compose import from_yaml, run_dir
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.run_names import has_config
from moetrain.config.schema import Config
from moetrain.config.trained_keys import Changed, changes, without_starts
from moetrain.data.batches.batch import Dataset
from moetrain.data.loader import build_dataset
from moetrain.data.preparation.by_fingerprint import NAME_LENGTH, find_prepared, prepared_place
from moetrain.data.preparation.prepare import wrong_data_error
from moetrain.data.preparation.prepared_dataset import open_prepared
from moetrain.data.pretokenized.end_token import open_tokenizer
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.data.tokenizers.tokenizer import Tokenizer, configured_tokenizer, load_tokenizer
from moetrain.errors import CheckpointError, ConfigErrors, DataError
from moetrain.files import nearby, shown
from moetrain.model.build import ConvertModel, build_model
from moetrain.model.transformer import Transformer
from moetrain.runs.completion import config_of, trained_config
from moetrain.runs.origin import origin_of
from moetrain.train.checkpoint.load import load_newest_model, newest_manifest, other_model
from moetrain.train.data_setup import open_on_ranks, prepare_on_main
from moetrain.train.session import join

_EMBEDDING = "model.embed"
_PREPARED = ("text", "tokens")  # kinds of data that lie in a prepared folder
_LOOKED_AT = 256                # documents whose last token is compared
# Errors of a source that has moved, or is empty now.
_GONE = ("E-DATA-010", "E-DATA-020", "E-DATA-030", "E-DATA-032")


class Origin(Protocol):
    """What a model was trained with: by it, tokenizer and data are found."""

    @property
    def config(self) -> Config: ...

    @property
    def directory(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def places(self) -> tuple[Path, ...]: ...

    @property
    def fingerprint(self) -> str: ...


class RecordedRun(NamedTuple):
    """The run of a checkpoint, without its model."""

    config: Config
    directory: Path
    manifest: Manifest
    places: tuple[Path, ...]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data that it was trained on."""
        return str(self.manifest.facts.get("data"))


def recorded_run(config: Config, checkpoint: Path) -> RecordedRun:
    """Describe the run of a checkpoint.

    Args:
        config: the config that it was trained with.
        checkpoint: directory of the checkpoint, in that of the run.
    """
    directory = checkpoint.parents[1]
    return RecordedRun(config, directory, read_manifest(checkpoint), _places(directory, config))


class Trained(NamedTuple):
    """A model and its origin."""

    model: Transformer
    mesh: Mesh
    config: Config             # of the command, with the data that the model was trained on
    directory: Path            # of the run
    manifest: Manifest         # of the checkpoint
    places: tuple[Path, ...]   # where prepared data of the run may lie
    changed: tuple[Changed, ...]   # keys by which the model is not the one that was trained

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return self.manifest.values["step"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data that it was trained on."""
        return str(self.manifest.facts.get("data"))


def load_trained(config: Config, typed: frozenset[str] = frozenset(),
                 convert_model: ConvertModel | None = None) -> Trained:
    """Load the newest sound checkpoint of a run, in evaluation mode. Collective.

    Args:
        config: the run's config with the command's overrides; its section `data` may name other data.
        typed: keys that the overrides set.
        convert_model: that of the training, if it had one.
    """
    directory = run_dir(config)
    if newest(directory) is None:
        raise CheckpointError(
            2, "the run has no checkpoint yet", where=str(directory / "checkpoints"),
            why="a run saves at its end and every checkpoint.interval steps",
            next="the command that trains the run; it saves at run.stop_at, too",
        )
    mesh = join(config)
    manifest = all_or_none(mesh["batch"], lambda: newest_manifest(directory))
    vocab_size = all_or_none(mesh["batch"], lambda: _vocabulary(manifest, directory))
    trained = all_or_none(mesh["batch"], lambda: _recorded(manifest, directory))
    config = replace(config, run=replace(config.run, seed=trained.run.seed, steps=trained.run.steps))
    model = build_model(without_starts(config), vocab_size, mesh, convert_model)
    found = load_newest_model(model, directory, mesh, verify=config.checkpoint.verify)
    model.eval()
    own = as_trained(config, trained_config(directory, found.path), typed)
    places = _places(directory, own, config.data.cache)
    return Trained(model, mesh, own, directory, found.manifest, places, changes(trained, own))


def _places(directory: Path, own: Config, cache: str | None = None) -> tuple[Path, ...]:
    """Where prepared data of a run may lie; `cache` is the folder that a command names."""
    named = (cache, own.data.cache, own.data.path if own.data.kind == "tokens" else None)
    return tuple(dict.fromkeys([directory / "data", *(Path(path) for path in named if path)]))


def as_trained(config: Config, trained: Config, typed: frozenset[str]) -> Config:
    """Replace the section `data` of a config by the run's own.

    The place of prepared data and a document mask that the command sets are kept.

    Args:
        config: config of the command.
        trained: config that the run was trained with.
        typed: keys that the command sets.
    """
    mask = (trained.data.mask_documents if "data" in typed and "data.mask_documents" not in typed
            else config.data.mask_documents)
    data = replace(trained.data, mask_documents=mask, overlap=config.data.overlap,
                   cache=config.data.cache or trained.data.cache)
    return replace(config, data=data)


def _recorded(manifest: Manifest, directory: Path) -> Config:
    """The config that the checkpoint records: config.yaml of the run may have been changed since.

    It is config.yaml nevertheless where another release wrote a record that cannot be read here.
    """
    try:
        return config_of(manifest, directory)
    except (CheckpointError, ConfigErrors):
        if not has_config(directory):
            raise
        return from_yaml(directory / "config.yaml")


def _vocabulary(manifest: Manifest, directory: Path) -> int:
    entry = manifest.entry(_EMBEDDING)
    if entry is None or len(entry.shape) != 2:
        raise other_model(directory / "checkpoints", [f"{_EMBEDDING} is not in the checkpoint"])
    return entry.shape[0]


def trained_tokenizer(run: Trained) -> Tokenizer | None:
    """The tokenizer that the model was trained with; None where its ids stand for no text. Collective."""
    if run.config.data.kind not in _PREPARED:
        return getattr(trained_dataset(run), "tokenizer", None)
    return all_or_none(run.mesh["batch"], lambda: prepared_tokenizer(run))


def prepared_tokenizer(run: Origin) -> Tokenizer | None:
    """The tokenizer of a run on prepared text, on one rank alone: beside the data, or where it was read."""
    data, named = run.config.data, run.manifest.facts.get("tokenizer")
    if named == "bytes":
        return load_tokenizer("bytes")
    if (found := find_prepared(run.fingerprint, run.places)) is not None:
        return found.tokenizer
    kept = origin_of(run.directory)
    if kept is not None and named is None:                       # a public folder without a tokenizer
        return None
    if data.kind != "text" or named is None:
        raise _missing(run, "the tokenizer lies with the data")
    if kept is not None and not Path(data.tokenizer).exists():   # a run that was imported, and moved since
        data = replace(data, tokenizer=str(kept / Path(data.tokenizer).name))
    try:
        tokenizer = configured_tokenizer(data)
    except DataError as error:
        raise _missing(run, f"{error.what}: {error.where}") from error
    check_tokenizer(tokenizer, str(named), data.tokenizer)
    return tokenizer


class GenerationTokenizer(NamedTuple):
    """What text is generated with."""

    tokenizer: Tokenizer
    end_id: int | None  # id of the end-of-document token; None where the run has seen none


def choose_tokenizer(run: Trained, config: Config, typed: frozenset[str]) -> GenerationTokenizer:
    """Choose the tokenizer for generation: the run's own, or the command's if the run has none. Collective.

    Raises DataError where there is none, or where the command sets a key of `data` that generation does not
    read to another value than the run's.

    Args:
        run: the trained model.
        config: config of the command.
        typed: keys that the command sets.
    """
    read = {"data.tokenizer", "data.cache", "data.mask_documents"}
    read |= {"data.end_token", "data.parse_special"} if "data.tokenizer" in typed else set()
    beside = {key for key in typed if key == "data" or key.startswith("data.")} - read
    asked, own_data = (with_absolute_paths(one).data for one in (config, run.config))
    fields = {key: key.split(".")[1] if "." in key else "kind" for key in beside}
    beside = {key for key, field in fields.items() if getattr(asked, field) != getattr(own_data, field)}
    if beside:
        raise DataError(178, f"{', '.join(sorted(beside))} with generate", where="the command line",
                        why="a text is continued with the tokenizer that the run was trained with, "
                            "and reads no data",
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
        raise no_text(run, "there is no tokenizer to write with",
                      "train with data=text, or give data.tokenizer")
    if own is not None:
        check_tokenizer(chosen, own.identity, data.tokenizer)
    else:
        refuse_more_ids(run, chosen.vocab_size, f"{shown(data.tokenizer)} (data.tokenizer)")
    return GenerationTokenizer(
        chosen, chosen.end_id if dataset is None or _ends_in(dataset, chosen.end_id) else None)


def _ends_in(dataset: Dataset, end_id: int) -> bool:
    """Whether documents end in this id, which those written by other programs may not."""
    stream = dataset.train_stream
    ends = np.append(stream.document_starts[1:], stream.size)
    return any(int(stream.read(int(end) - 1, 1)[0]) == end_id for end in ends[:_LOOKED_AT].tolist())


def no_text(run: Trained, why: str, next: str) -> DataError:
    """Return the error of a run without a tokenizer.

    Args:
        run: the trained model.
        why: what a tokenizer is needed for.
        next: what to do.
    """
    return DataError(173, "the run was trained on tokens that stand for no text",
                     where=nearby(run.directory), why=why, next=next)


def refuse_more_ids(run: Trained, vocab_size: int, where: str) -> None:
    """Raise DataError where a vocabulary has more ids than the model.

    Args:
        run: the trained model.
        vocab_size: size of the vocabulary.
        where: its origin, for the error.
    """
    trained = run.model.embed.shape[0]
    if vocab_size > trained:
        raise DataError(175, "there are more ids than the model has", where=where,
                        why=f"the vocabulary has {vocab_size:,} ids, the model's {trained:,}",
                        next="leave it out, or give that of the tokenizer that the run was trained with")


def check_tokenizer(tokenizer: Tokenizer, trained: str, path: str) -> None:
    """Raise DataError where a tokenizer is not the one that the run was trained with.

    Args:
        tokenizer: the tokenizer.
        trained: identity of the run's tokenizer.
        path: file of the tokenizer, for the error.
    """
    if tokenizer.identity != trained:
        raise DataError(
            172, "the tokenizer is not the one that the run was trained with",
            where=f"{shown(path)} (data.tokenizer)",
            why=f"it is {tokenizer.identity[:32]}, the run's is {trained[:32]}: "
                "the same ids stand for other text",
            next="leave data.tokenizer out, or restore the file")


def trained_dataset(run: Trained) -> Dataset:
    """Open the data that the run was trained on, with what it held out. Collective."""
    if "data" not in run.manifest.facts and origin_of(run.directory) is not None:
        raise DataError(
            180, "the model was imported, and nothing was held out here", where=nearby(run.directory),
            why="what it was trained on is not part of a public folder",
            next=f"moetrain eval {nearby(run.directory)} data.path=<file or folder of text>")
    folder = None
    if run.config.data.kind in _PREPARED:
        folder = from_first(run.mesh["batch"], lambda: _folder(run))
        if folder is None:
            folder = _prepared_again(run)
    dataset = open_on_ranks(_with_path(run.config, folder), run.directory, run.mesh, folder)
    return all_or_none(run.mesh["batch"], lambda: _as_trained(run, dataset))


def open_trained(run: Origin) -> Dataset | None:
    """Open that data on one rank alone; None where it is missing."""
    folder = _folder(run)
    if folder is None and run.config.data.kind in _PREPARED:
        return None
    indexes = TokenIndexes(prepared_place(run.config.data, run.directory), use="keep")
    return _as_trained(
        run, build_dataset(_with_path(run.config, folder), run.directory, folder, indexes=indexes))


def _folder(run: Origin) -> Path | None:
    found = find_prepared(run.fingerprint, run.places)
    return found and found.folder


def _prepared_again(run: Trained) -> Path:
    data = run.config.data
    try:
        if data.kind == "tokens":
            raise wrong_data_error(data.path, open_prepared(Path(str(data.path)), verify=False).fingerprint,
                                   run.fingerprint)
        return prepare_on_main(run.config, run.directory, run.mesh, expected=run.fingerprint)
    except DataError as error:
        if error.id not in _GONE:
            raise
        raise _missing(run, f"{error.what}: {error.where}") from error


def _missing(run: Origin, why: str) -> DataError:
    return DataError(
        170, "the data that the run was trained on is not there",
        where=", ".join(nearby(place) for place in run.places),
        why=f"there is no prepared folder {run.fingerprint[:NAME_LENGTH]} in them; {why}",
        next=f"data.cache=<the folder that holds {run.fingerprint[:NAME_LENGTH]}>, "
             "or restore what the run was trained on")


def _with_path(config: Config, folder: Path | None) -> Config:
    """Set data.path of prepared tokens to the folder in which they were found."""
    return (replace(config, data=replace(config.data, path=str(folder))) if config.data.kind == "tokens"
            else config)


def _as_trained(run: Origin, dataset: Dataset) -> Dataset:
    if dataset.fingerprint != run.fingerprint:
        raise wrong_data_error(run.config.data.path, dataset.fingerprint, run.fingerprint)
    return dataset
