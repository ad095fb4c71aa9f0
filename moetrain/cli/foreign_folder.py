"""Folders of other programs for `inspect` and `checkpoint verify`: what they hold, and what experts lack."""

import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from moetrain.checkpoint.tensors import CheckpointTensors
from moetrain.cli.table import table
from moetrain.errors import CONTINUED, CheckpointError
from moetrain.files import read_json
from moetrain.interop.dcp.folder import StoredFolder, open_stored
from moetrain.interop.dcp.records import ELEMENT_BYTES, damaged
from moetrain.interop.expert_check import Verdict, check_experts, unseen
from moetrain.interop.expert_names import Bank, find_banks, in_order
from moetrain.units import decimal

_LARGEST = 5
_LISTED = 20  # faults in one message
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def inspect(directory: Path, pattern: str | None) -> Iterator[str]:
    """Yield the experts of a folder by layer and its largest tensors, or the tensors of a pattern."""
    with open_stored(directory) as folder:
        if pattern is not None:
            rows = [["tensor", "dtype", "shape", "chunks", "bytes"]]
            rows += [[name, folder.dtype(name), str(list(folder.shape(name))),
                      str(len(folder.tensors[name].chunks)), decimal(folder.bytes_of(name), "B", 4)]
                     for name in sorted(folder.tensors, key=in_order) if fnmatch(name, pattern)]
            yield from table(rows)
            return
        yield f"{directory}"
        yield f"  format   {folder.kind}, of another program"
        total = sum(map(folder.bytes_of, folder.tensors))
        yield f"  tensors  {len(folder.tensors):,}, {decimal(total, 'B', 4)}"
        if folder.others:
            yield f"  others   {len(folder.others):,} values that are no tensors and are not read"
        yield ""
        banks, parts = find_banks({name: folder.shape(name) for name in folder.tensors})
        yield from table([["experts of", "number", "matrices", "chosen from"],
                          *([bank.name, str(len(bank.ids)), _matrices(bank, folder), _router(bank)]
                            for bank in banks)]) if banks else ("  no tensor looks like one of an expert",)
        yield from (f"  {name}: of experts, in two dims" for name in parts)
        yield ""
        largest = sorted(folder.tensors, key=lambda name: (-folder.bytes_of(name), in_order(name)))[:_LARGEST]
        yield from table([["largest", "dtype", "shape", "bytes"],
                          *([name, folder.dtype(name), str(list(folder.shape(name))),
                             decimal(folder.bytes_of(name), "B", 4)] for name in largest)])


def verify(directory: Path, advance: Callable[[int], None]) -> None:
    """Read a foreign folder whole and print what is there.

    Raises CheckpointError where bytes are damaged, or experts are missing, zero, or equal to each other.
    """
    began = time.perf_counter()
    with open_stored(directory) as folder:
        damage = [fault for name in folder.tensors for fault in folder.check_content(name, advance)]
        if damage:
            raise damaged(directory, CONTINUED.join(damage[:_LISTED]), "restore these files")
        banks, parts = find_banks({name: folder.shape(name) for name in folder.tensors})
        expected = _expected(directory)
        verdicts = list(check_experts(banks, folder, expected=expected, progress=advance))
        size = sum(map(folder.bytes_of, folder.tensors))
        faults = [f"{verdict.bank.name}: {fault}" for verdict in verdicts
                  for fault in (*verdict.lost, *verdict.alike)]
        print(f"{'damaged' if faults else 'good':8s} {directory}   {folder.kind}, {len(folder.tensors):,} "
              f"tensors, {decimal(size, 'B', 4)} in {time.perf_counter() - began:.1f} s")
        for line in lines_of(verdicts):
            print(f"         {line}")
        for text in unseen(banks, parts, expected):
            print(f"         not seen: {text}")
        if not banks:
            print("         no tensor looks like one of an expert")
    if faults:
        number = sum(bool(verdict.lost or verdict.alike) for verdict in verdicts)
        layers = "one layer" if number == 1 else f"{number} layers"
        raise CheckpointError(
            35, f"the experts of {layers} are not all there, or not all different",
            where=str(directory), why=CONTINUED.join(faults[:_LISTED]),
            next="save each expert under a name of its own, or as a DTensor whose dim 0 is sharded over the "
                 "expert-parallel ranks; equal experts are right after copying alone (upcycling)")


def verify_own(directory: Path, advance: Callable[[int], None]) -> list[CheckpointError]:
    """Print what the experts of a checkpoint of moetrain are; errors where some are no numbers.

    A checkpoint names every expert, so none can be lost by saving it. Equal experts are said, and no damage:
    upcycling copies them.
    """
    with CheckpointTensors(directory) as tensors:
        banks, _ = find_banks({name: shape for name, shape in tensors.shapes().items()
                               if name.startswith("model.")})
        verdicts = list(check_experts(banks, tensors, routers=False, progress=advance))
    lost = [f"{verdict.bank.name}: {fault}" for verdict in verdicts for fault in verdict.lost
            if "another number" not in fault]
    for verdict in verdicts:
        for fault in verdict.alike:
            print(f"         {verdict.bank.name}: {fault}")
    if not lost:
        return []
    return [CheckpointError(36, "experts of a checkpoint hold NaN or infinity", where=str(directory),
                            why="; ".join(lost), next="continue from an older checkpoint")]


def lines_of(verdicts: list[Verdict]) -> Iterator[str]:
    """Yield a line for each layer without faults; layers whose experts are of one kind share it."""
    for verdict in verdicts:
        for fault in (*verdict.lost, *verdict.alike):
            yield f"{verdict.bank.name}: {fault}"
    sound = [verdict.bank for verdict in verdicts if not verdict.lost and not verdict.alike]
    kinds: dict[tuple[int, bool, tuple[str, ...]], list[Bank]] = {}
    for bank in sound:
        kinds.setdefault((len(bank.ids), bank.is_optimizer, tuple(sorted(bank.matrices))), []).append(bank)
    for (count, optimizer, matrices), banks in kinds.items():
        first, last = banks[0].name, banks[-1].name
        where = first if len(banks) == 1 else f"{first} to {last} ({len(banks)} layers)"
        what = "moments of " if optimizer else ""
        yield f"{where}: {what}{count} experts, all different ({', '.join(matrices)})"


def _expected(directory: Path) -> int | None:
    """Number of experts that a config.json in the folder says."""
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError):
        return None
    sections: list[Any] = [config, config.get("text_config")] if isinstance(config, dict) else []
    found = (section[key] for section in sections if isinstance(section, dict) for key in _EXPERTS
             if type(section.get(key)) is int and section[key] > 0)
    return next(found, None)


def _matrices(bank: Bank, folder: StoredFolder) -> str:
    """Names and shapes of an expert's matrices, and the bytes of one expert."""
    texts, size = [], 0
    for matrix, places in bank.matrices.items():
        place = places[min(places)]
        shape = folder.shape(place.tensor)[len(place.indices):]
        size += prod(shape) * ELEMENT_BYTES[folder.dtype(place.tensor)]
        texts.append(f"{matrix} {list(shape)}")
    return f"{', '.join(texts)}: {decimal(size, 'B', 4)} each"


def _router(bank: Bank) -> str:
    return f"{bank.chosen_from} ({bank.router})" if bank.chosen_from is not None else "no router"
