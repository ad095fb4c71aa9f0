"""Runs that begin from weights: `init.from`.

    with_initial_weights    find and compare them, in every rank alone, before the ranks join
    load_initial_weights    read them into the model of a run at step 0

Only the weights are read: optimizer, step and order of the data begin anew. The resolved config names the
checkpoint and the digest of its weights. A run that has a checkpoint goes on with that one; what it began
from is neither read again nor needed any more.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moetrain.checkpoint.compare import TensorKind, differences, stored_tensors
from moetrain.checkpoint.digest import WEIGHTS, weights_digest
from moetrain.checkpoint.manifest import checkpoints_of, read_manifest
from moetrain.checkpoint.records import Manifest
from moetrain.checkpoint.verify import check_files
from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import largest_over
from moetrain.config.schema import Config, InitConfig
from moetrain.config.size_check import vocabulary_of
from moetrain.errors import CONTINUED, ConfigError
from moetrain.model.build import ConvertModel, weights_on_meta
from moetrain.parallel.state_shards import DTYPE_NAMES
from moetrain.runs.completion import newest_sound_checkpoint, trained_config
from moetrain.runs.named_checkpoint import named_checkpoints
from moetrain.runs.origin import keep_origin
from moetrain.train.checkpoint.load import load_weights
from moetrain.train.state import Run

log = logging.getLogger(__name__)

EMBEDDING = "model.embed"
_MODULE = re.compile(r"(?:model|buffer)\.(mtp\.[0-9]+)\.")


def with_initial_weights(config: Config, directory: Path,
                         convert_model: ConvertModel | None = None) -> Config:
    """Resolve the section `init` of a run, and compare the weights with its model.

    Args:
        config: the config of the run.
        directory: directory of the run.
        convert_model: changes the model before it is sharded (model/build.py).

    Returns:
        The config with path and digest of the checkpoint; of a run that has a checkpoint, as it began.

    Raises:
        ConfigError: there are no such weights, or they do not fit the model.
        CheckpointError: a file of the weights is damaged.
    """
    if checkpoints_of(directory):
        own = newest_sound_checkpoint(directory)
        return config if own is None else replace(config, init=trained_config(directory, own).init)
    if config.init.from_ is None:
        return config
    checkpoint = named_checkpoints(config.init.from_)[-1].absolute()
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest)
    digest = weights_digest(manifest)
    if config.init.digest not in (None, digest):
        raise ConfigError(
            224, "the weights are not those of init.digest", where=f"init.digest, init.from={checkpoint}",
            why=f"their digest is {digest}, and {config.init.digest} is wanted",
            next="init.digest=null to begin from them all the same; or restore the checkpoint")
    if not any(name.startswith(WEIGHTS) for name in manifest.names()):
        raise ConfigError(225, "there are no weights in the checkpoint", where=f"init.from={checkpoint}",
                          why="none of its tensors is one of a model", next="init.from=<another checkpoint>")
    entry = manifest.entry(EMBEDDING)
    ids = vocabulary_of(config) or (entry.shape[0] if entry and entry.shape else 1)
    check_weights(config, checkpoint, manifest, ids, convert_model)
    return replace(config, init=InitConfig(str(checkpoint), digest))


def check_weights(config: Config, checkpoint: Path, manifest: Manifest, vocab_size: int,
                  convert_model: ConvertModel | None = None) -> None:
    """Raise ConfigError, which names every difference, where weights do not fit the model of a config.

    Modules of multi-token prediction that only one of them has are no difference (`other_modules`).

    Args:
        config: the config of the run.
        checkpoint: directory of the weights.
        manifest: their manifest.
        vocab_size: V, rows of embedding and head.
        convert_model: changes the model before it is sharded (model/build.py).
    """
    expected = {name: TensorKind(DTYPE_NAMES[shard.rows.dtype], tuple(shard.shape))
                for name, shard in weights_on_meta(config, vocab_size, convert_model).items()}
    found = stored_tensors(manifest, WEIGHTS)
    without = other_modules(expected, found).prefixes
    expected, found = ({name: kind for name, kind in each.items() if not name.startswith(without)}
                       for each in (expected, found))
    if not (differ := differences(expected, found)):
        return
    own = checkpoint.parents[1] / "config.yaml"
    advice = (f"leave model=, model.* and experiment= out: the model of {own} is then taken over; "
              "or leave init.from out")
    wanted, there = expected.get(EMBEDDING), found.get(EMBEDDING)
    if wanted and there and there.shape[0] > wanted.shape[0] and there.shape[1:] == wanted.shape[1:]:
        advice = f"model.vocab_size={there.shape[0]}; or {advice}"
    if any(kind.dtype == "F64" for kind in found.values()) and config.run.dtype != "float64":
        advice = f"run.dtype=float64; or {advice}"
    raise ConfigError(223, "the weights do not fit the model", where=f"model.*, init.from={checkpoint}",
                      why=CONTINUED.join(differ), next=advice)


class OtherModules(NamedTuple):
    """Modules of multi-token prediction, as `mtp.0`, that only a model or only its initial weights have."""

    new: list[str]
    left: list[str]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of their tensors."""
        return tuple(f"{kind}{module}." for kind in WEIGHTS for module in (*self.new, *self.left))


def other_modules(expected: Iterable[str], found: Iterable[str]) -> OtherModules:
    """Compare the modules of multi-token prediction of a model with those of weights.

    A base model is trained on with new modules, and modules that nobody wants to train are left out: both are
    common, and neither changes what the model itself computes.

    Args:
        expected: names of the tensors of the model.
        found: names of the tensors of the weights.
    """
    own, theirs = ({found[1]: None for name in names if (found := _MODULE.match(name))}
                   for names in (expected, found))
    return OtherModules([name for name in own if name not in theirs],
                        [name for name in theirs if name not in own])


def load_initial_weights(run: Run, convert_model: ConvertModel | None = None) -> Manifest | None:
    """Read the weights that a new run begins from into its model. Collective.

    Args:
        run: the run, at step 0, with the config that `with_initial_weights` returned.
        convert_model: changes the model before it is sharded (model/build.py).

    Returns:
        The manifest of the weights; None where the run begins from none, or has a checkpoint.
    """
    source = run.config.init.from_
    if source is None or _has_checkpoint(run.directory, run.mesh):
        return None
    checkpoint = Path(source)
    ids = run.state.model.embed.shape[0]
    check_weights(run.config, checkpoint, read_manifest(checkpoint), ids, convert_model)
    others = other_modules(weights_on_meta(run.config, ids, convert_model),
                           stored_tensors(read_manifest(checkpoint), WEIGHTS))
    manifest = load_weights(run.state.model, checkpoint, run.mesh, verify=run.config.checkpoint.verify,
                            without=others.prefixes)
    for modules, what in ((others.new, "are not in the weights: they start anew"),
                          (others.left, "of the weights are left out, as model.mtp_layers says")):
        if run.mesh.is_main and modules:
            log.warning("[warn] the modules of multi-token prediction %s %s", ", ".join(modules), what)
    if run.mesh.is_main:
        keep_origin(checkpoint.parents[1], run.directory)
    own, theirs = getattr(run.dataset, "tokenizer", None), manifest.facts.get("tokenizer")
    if run.mesh.is_main and own is not None and theirs not in (None, own.identity):
        log.warning("[warn] the weights were trained with the tokenizer %.32s, and the data is read with "
                    "%.32s: the same ids stand for other text", theirs, own.identity)
    return manifest


def _has_checkpoint(directory: Path, mesh: Mesh) -> bool:
    """Whether any rank sees a checkpoint of the run."""
    return largest_over(mesh["batch"], float(bool(checkpoints_of(directory)))) > 0
