"""Writing of a run directory from a stream of named tensors, as transforms of checkpoints make them.

    <directory>/config.yaml
    <directory>/checkpoints/step-00000000      the weights alone: no optimizer, no step

Evaluation, generation, inspect and `init.from` work on it at once. Training cannot resume it, because there
is no optimizer; `init.from` begins from it. A transform that makes moments of an optimizer, too, hands over a
`Training`: the checkpoint then has a step, and training goes on there.

No more than one tensor and two buffers, of a twelfth of the largest layer, are in memory. The directory is
complete when `write_run` returns, and a failure leaves no checkpoint behind.
"""

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain import __version__
from moetrain.checkpoint import disk
from moetrain.checkpoint.commit import commit, write_rank
from moetrain.checkpoint.compare import TensorKind, differences
from moetrain.checkpoint.manifest import checkpoints_of
from moetrain.checkpoint.payload import TensorRows
from moetrain.checkpoint.records import ITEM_BYTES, row_count
from moetrain.checkpoint.tensor_names import NAMING
from moetrain.config.compose import to_yaml
from moetrain.config.recorded_paths import with_absolute_paths
from moetrain.config.run_names import has_config
from moetrain.config.schema import Config
from moetrain.config.values import as_tree
from moetrain.errors import CONTINUED, ConfigError
from moetrain.model.build import ConvertModel, weights_on_meta
from moetrain.parallel.state_shards import DTYPE_NAMES, DTYPES
from moetrain.runs.files import as_disk_error, replace_atomically
from moetrain.runs.lock import RunLock
from moetrain.transform.reader import WeightsReader

# Bytes of tensors that are collected before they are written: of a layer a small part, so that it makes no
# difference to the memory that a layer needs, and enough for few files and long writes.
_LEAST, _MOST, _PART = 8 << 20, 256 << 20, 12


class Training(NamedTuple):
    """How far the training has come that a run goes on with.

    Attributes:
        step: optimizer steps taken.
        tokens: valid tokens trained on.
        moments: dtypes and shapes of the optimizer's moments, by the names of a checkpoint: optim.embed.…
    """

    step: int
    tokens: int
    moments: dict[str, TensorKind]


def write_run(directory: str | Path, config: Config, tensors: Iterable[tuple[str, Tensor]], *,
              source: WeightsReader | None = None, vocab_size: int | None = None,
              training: Training | None = None,
              facts: dict[str, Any] | None = None, convert_model: ConvertModel | None = None) -> Path:
    """Write the weights of a model, and its config, as a run that training has not begun.

    Tensors may come in any order. They are stored in the dtype of the model's parameters: float32, or float64
    with run.dtype=float64.

    Args:
        directory: directory of the run, which holds none yet.
        config: config of the model. Its paths are recorded as absolute ones.
        tensors: (name, values) of every weight, by the names of a checkpoint: model.embed, …
        source: weights that they were made of. Data and tokenizer are recorded as the source's.
        vocab_size: V, rows of embedding and head; those of `source` unless given.
        training: the training that goes on with them; its moments are then among the tensors. None for
            weights alone.
        facts: how they were made, for the manifest.
        convert_model: that of the model, if it has one.

    Returns:
        Directory of the checkpoint.

    Raises:
        ConfigError: the directory holds a run; or tensors are missing, unknown or of another shape. Each is
            named.
        DiskError: the directory cannot be written.
    """
    directory = Path(directory)
    rows = vocab_size if vocab_size is not None else source.vocab_size if source else None
    if rows is None:
        raise TypeError("write_run needs vocab_size, or source")
    training = training or Training(0, 0, {})
    expected = {name: TensorKind(DTYPE_NAMES[shard.rows.dtype], tuple(shard.shape))
                for name, shard in weights_on_meta(config, rows, convert_model).items()} | training.moments
    with as_disk_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with RunLock(directory):
            _refuse_existing(directory)
            final = _write_checkpoint(directory, expected, tensors, training, {
                **_origin(source), **(facts or {}), "moetrain": __version__, "names": NAMING,
                "config": as_tree(with_absolute_paths(config)), "torch": torch.__version__, "mesh": {},
                "ranks": 1, "time": time.time()})
            with replace_atomically(directory / "config.yaml") as file:
                file.write(to_yaml(with_absolute_paths(config)).encode())
    return final


def _refuse_existing(directory: Path) -> None:
    if has_config(directory) or checkpoints_of(directory):
        raise ConfigError(
            226, "the directory holds a run already", where=str(directory),
            why="its checkpoints would be mixed with the new one, or lost",
            next=f"another directory; or rm -r {directory}")


def _origin(source: WeightsReader | None) -> dict[str, Any]:
    """Facts of the source that evaluation and generation read: data, its order, tokenizer; and its digest."""
    if source is None:
        return {}
    own = source.manifest.facts
    return {**{name: own[name] for name in ("data", "order", "tokenizer") if name in own},
            "source": {"path": str(source.directory.absolute()), "digest": source.digest}}


def _write_checkpoint(directory: Path, expected: dict[str, TensorKind],
                      tensors: Iterable[tuple[str, Tensor]], training: Training,
                      facts: dict[str, Any]) -> Path:
    """Stream tensors into payload files, and commit them as a checkpoint."""
    step, buffer = training.step, _buffer(expected)
    final = directory.absolute() / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f"{final.name}.tmp-1")
    disk.remove_tree(temporary)
    found: dict[str, TensorKind] = {}
    parts, items, size = 0, list[TensorRows](), 0
    thread = ThreadPoolExecutor(1)               # writes a buffer while the next one is filled
    under_way: Future[None] = thread.submit(lambda: None)
    try:
        for name, tensor in tensors:
            if name in found:
                raise _misfit(directory, [f"{name}: came twice"])
            kind = expected.get(name)
            found[name] = _kind(tensor) if kind is None else TensorKind(kind.dtype, tuple(tensor.shape))
            if kind is None or kind.shape != tuple(tensor.shape):
                continue                                   # named at the end, with all others
            items.append(_item(name, tensor, kind))
            size += len(items[-1].content)
            if size >= buffer:
                under_way.result()
                under_way = thread.submit(write_rank, temporary, parts, items, step)
                parts, items, size = parts + 1, [], 0
        under_way.result()
        if differ := differences(expected, found):
            raise _misfit(directory, differ)
        write_rank(temporary, parts, items, step)
        commit(temporary, final, ranks=parts + 1, facts=facts,
               values={"step": step, "tokens": training.tokens})
    except BaseException:
        thread.shutdown()
        with suppress(OSError):
            disk.remove_tree(temporary)
        raise
    thread.shutdown()
    return final


def _buffer(expected: dict[str, TensorKind]) -> int:
    """Bytes that are collected: a twelfth of the largest layer."""
    layers = Counter[str]()
    for name, kind in expected.items():
        layers[".".join(name.split(".")[:3])] += ITEM_BYTES[kind.dtype] * prod(kind.shape)
    return min(max(max(layers.values()) // _PART, _LEAST), _MOST)


def _kind(tensor: Tensor) -> TensorKind:
    return TensorKind(DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def _item(name: str, tensor: Tensor, kind: TensorKind) -> TensorRows:
    """Copy a tensor to host memory, in the dtype and layout in which it is stored."""
    values = tensor.detach().to(device="cpu", dtype=DTYPES[kind.dtype], copy=True).contiguous()
    content = memoryview(values.reshape(-1).view(torch.uint8).numpy())
    return TensorRows(name, kind.dtype, kind.shape, 0, row_count(kind.shape), content)


def _misfit(directory: Path, differ: list[str]) -> ConfigError:
    return ConfigError(
        223, "the weights do not fit the model", where=str(directory), why=CONTINUED.join(differ),
        next="yield every tensor once, with the names and shapes of the config's model")
