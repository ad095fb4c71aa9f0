"""Import of a public folder: its model as a run that evaluates, generates and trains at once.

    1. family and config                   config.json; values that are typed lie on top
    2. every tensor has a place            importing.py, before anything is written
    3. weights, layer by layer             importing.py
    4. what the way back needs             runs/origin.py: config.json, tokenizer, spelling, dtypes

A folder of torch.distributed.checkpoint is read by the same names, where a config.json says what it holds.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.config.compose import compose
from moetrain.config.overrides import read
from moetrain.config.schema import Config
from moetrain.config.suggest import nearest
from moetrain.config.values import to_config
from moetrain.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from moetrain.errors import CheckpointError, DataError
from moetrain.files import create
from moetrain.interop.dcp.as_huggingface import open_dcp
from moetrain.interop.huggingface.export_files import GENERATION, most_common
from moetrain.interop.huggingface.families import FAMILIES
from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.folder import open_folder
from moetrain.interop.huggingface.importing import PublicFolder, account_for, import_folder
from moetrain.interop.huggingface.tokenizer_files import TOKENIZER_FILES
from moetrain.runs.files import as_disk_error
from moetrain.runs.origin import FOLDER, RECORD

SECTIONS = ("model", "router", "expert")         # of which values may be typed beside the folder's
LONGEST = 4096                                   # train.seq_len of the new run, where the model goes further


class Imported(NamedTuple):
    """A run that was written.

    Attributes:
        checkpoint: its checkpoint.
        config: its config.
        family: family of the folder.
        dtypes: dtypes of the folder's tensors by name, as safetensors spells them.
        preserved: names of tensors without counterpart, which are kept for the way back.
        duplicates: names of tensors that repeat another.
        unknown: keys of config.json that mean nothing here, which are kept, too.
        tokenizer: that of the folder; None where it has none that is read here.
        tokenizer_missing: why there is none.
        numbers: values of all weights.
    """

    checkpoint: Path
    config: Config
    family: Family
    dtypes: dict[str, str]
    preserved: list[str]
    duplicates: list[str]
    unknown: list[str]
    tokenizer: Tokenizer | None
    tokenizer_missing: str
    numbers: int


def open_source(directory: Path, config: Mapping[str, Any] | None = None) -> PublicFolder:
    """Open a public folder, or one of torch.distributed.checkpoint.

    Args:
        directory: the folder.
        config: config.json of a DCP folder that has none.
    """
    return open_dcp(directory, config) if (directory / ".metadata").is_file() else open_folder(directory)


def import_run(directory: Path, out: Path, *, overrides: Sequence[str] = (),
               config: Mapping[str, Any] | None = None,
               progress: Callable[[int], Callable[[int], None]] | None = None) -> Imported:
    """Write the model of a folder as a run.

    Args:
        directory: the folder.
        out: directory of the run, which must hold none.
        overrides: `model.`, `router.`, `expert.` and `run.dtype` as typed on a command line.
        config: config.json of a DCP folder that has none.
        progress: is told the bytes to read; returns what is told the bytes read.

    Raises:
        ConfigError: `out` holds a run, or the model has no counterpart here.
        CheckpointError: the folder is damaged or incomplete, or of a family that is not known.
    """
    with open_source(directory, config) as folder:
        family = _family(folder, directory)
        tokenizer, missing = _tokenizer(directory)
        run_config = _config(family, folder.config, out, tokenizer, overrides)
        account = account_for(folder, family, run_config)
        dtypes = {name: folder.dtype(name) for name in folder.names}
        facts = {"tokenizer": tokenizer.identity if tokenizer is not None else None,
                 "imported": {"family": family.model_type, "folder": str(directory.absolute())}}
        checkpoint = import_folder(
            folder, out, family=family, config=run_config, facts=facts,
            files=lambda unfinished: _keep_origin(folder, family, directory, unfinished / FOLDER, dtypes),
            advance=progress(folder.size) if progress else lambda count: None)
        unknown = sorted(folder.config.keys() - family.known_keys)
        numbers = sum(_numbers(folder.shape(name)) for group in account.maps for name in group.theirs)
    return Imported(checkpoint, run_config, family, dtypes, list(account.preserved), list(account.duplicates),
                    unknown, tokenizer, missing, numbers)


def _family(folder: PublicFolder, directory: Path) -> Family:
    name = folder.config.get("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    near = nearest(str(name), FAMILIES)
    raise CheckpointError(
        53, f"there is no family {name}", where=f"{directory / 'config.json'}, model_type",
        why=f"the families are {', '.join(FAMILIES)}",
        next=(f"model_type: {near[0]}, if the model is one; or " if near else "")
        + "a folder of one of these families")


def _config(family: Family, theirs: Mapping[str, Any], out: Path, tokenizer: Tokenizer | None,
            overrides: Sequence[str]) -> Config:
    """Config of the run: the folder's model, what is typed on top, everything else at its default."""
    sections = family.to_config(theirs)
    command, problems = read(list(overrides))
    plain = [word for word in overrides if word.partition(".")[0].lstrip("+") not in SECTIONS]
    base = compose(["data=text", *plain])
    for key, given in command.values.items():
        section, _, name = key.partition(".")
        if section in SECTIONS:
            sections[section][name] = given.value
    model = to_config({"model": sections["model"]}).model
    length = min(theirs.get("max_position_embeddings") or LONGEST, LONGEST)
    named = str((out / FOLDER / "tokenizer.json").absolute()) if tokenizer is not None else "none"
    return replace(base, model=model, router=sections["router"], expert=sections["expert"],
                   run=replace(base.run, name=out.name),
                   train=replace(base.train, seq_len=length), data=replace(base.data, tokenizer=named))


def _tokenizer(directory: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a folder, or why there is none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None, "the folder has none"
    try:
        return load_tokenizer(str(directory)), ""
    except DataError as error:
        return None, f"{error.what} ({error.id}); {error.next}"


def _keep_origin(folder: PublicFolder, family: Family, directory: Path, origin: Path,
                 dtypes: Mapping[str, str]) -> None:
    """Keep what the way back needs beside the run (runs/origin.py)."""
    numeric = {name: {"U8": "BF16"}.get(dtype, "BF16" if dtype.startswith("F8") else dtype)
               for name, dtype in dtypes.items()}
    common = most_common(numeric)
    record = {"model_type": family.model_type, "spelling": family.spelling(folder.shapes), "dtype": common,
              "dtypes": {name: dtype for name, dtype in numeric.items() if dtype != common}}
    with as_disk_error(origin):
        origin.mkdir(exist_ok=True)
        for name in (*TOKENIZER_FILES, GENERATION):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, origin / name)
        for name, content, indent in (("config.json", folder.config, 2), (RECORD, record, 1)):
            with create(origin / name) as file:
                file.write((json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())


def _numbers(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
