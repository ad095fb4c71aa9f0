"""moetrain import DIR out=RUN [--json] [model.key=value ...]: begin from a public model.

DIR is a folder with config.json and safetensors of a public family: of the hub, fetched before, or written by
transformers. A checkpoint of torch.distributed.checkpoint is read, too; config=FILE names its config.json
where it has none of its own. Nothing of the folder is run, and nothing is fetched.

RUN is the name or directory of a run that does not exist yet. inspect, eval, generate and train init.from=RUN
take it at once, with the tokenizer of the folder. Keys of config.json that mean nothing here, files of the
tokenizer and of generation, and tensors without counterpart are kept for moetrain export.

Weights are stored in float32, or with run.dtype=float64 in float64. model.*, router.* and expert.* lie over
what config.json says: model.mtp_layers=1 trains modules that are only kept otherwise.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.key_words import Words, read_words
from moetrain.cli.progress import byte_progress
from moetrain.config.run_names import reference
from moetrain.errors import CheckpointError, ConfigError
from moetrain.files import nearby, read_json, reason
from moetrain.units import decimal

if TYPE_CHECKING:
    from moetrain.interop.huggingface.run_import import Imported

KEYS = {"out": "RUN", "config": "config.json"}
TAKEN = ("model", "router", "expert", "run")
_DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F64": "float64", "U8": "mxfp4",
           "F8_E4M3": "float8"}


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    words = read_words("import", argv, KEYS, sections=TAKEN)
    directory, out, config = _places(words)
    from moetrain.interop.huggingface.run_import import import_run

    with byte_progress() as progress:
        found = import_run(directory, out, overrides=words.others, config=config, progress=progress)
    if words.as_json:
        print(json.dumps(_record(directory, out, found), ensure_ascii=False))
    else:
        print("\n".join(_lines(directory, out, found)))
    return 0


def _places(words: Words) -> tuple[Path, Path, dict[str, Any] | None]:
    """The folder, the directory of the run, and the config.json of a DCP folder that has none."""
    named = [reference(word) for word in words.names]
    if len(named) != 1 or named[0] is None or "out" not in words.keys:
        raise ConfigError(
            319, "import takes one folder, and out= names the run to write", where="the command line",
            why=f"it was given {', '.join([*words.names, *(f'{key}=' for key in words.keys)]) or 'nothing'}",
            next="moetrain import <folder of a public model> out=<name of the new run>")
    out = words.keys["out"]
    config = None
    if "config" in words.keys:
        path = Path(words.keys["config"])
        try:
            config = read_json(path, limit=10 << 20)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                54, "the config.json cannot be read", where=f"config={path}", why=reason(error),
                next="config=<the config.json of the model>") from error
    return Path(named[0]), Path(out) if "/" in out else Path("runs") / out, config


def _record(directory: Path, out: Path, found: "Imported") -> dict[str, Any]:
    return {"folder": str(directory), "run": str(out), "checkpoint": str(found.checkpoint),
            "family": found.family.model_type, "architecture": found.family.architecture,
            "parameters": found.numbers, "dtypes": dict(Counter(found.dtypes.values())),
            "tensors": len(found.dtypes), "preserved": found.preserved, "duplicates": found.duplicates,
            "unknown_keys": found.unknown,
            "tokenizer": found.tokenizer.identity if found.tokenizer is not None else None}


def _lines(directory: Path, out: Path, found: "Imported") -> Iterator[str]:
    sizes, name = found.config.model, out.name if out.parent == Path("runs") else str(out)
    dtypes = ", ".join(f"{count:,} in {_DTYPES.get(dtype, dtype)}"
                       for dtype, count in Counter(found.dtypes.values()).most_common())
    read = len(found.dtypes) - len(found.preserved) - len(found.duplicates)
    kept = f"; {len(found.preserved):,} kept for the way back ({', '.join(found.preserved[:1])}, …)"
    twice = f"; {', '.join(found.duplicates)} there twice" * bool(found.duplicates)
    tokenizer, unknown = found.tokenizer, ", ".join(found.unknown)
    shared = f" + {sizes.num_shared_experts} shared" if sizes.num_shared_experts else ""
    rows = [
        ("family", f"{found.family.model_type} ({found.family.architecture})"),
        ("model", f"{sizes.num_layers} layers  d {sizes.dim}  {sizes.num_experts} experts top-{sizes.top_k}"
                  f"{shared}  vocabulary {sizes.vocab_size:,}   total {decimal(found.numbers)}"),
        ("tensors", f"{read:,} of {len(found.dtypes):,} read{twice}{kept * bool(found.preserved)}"),
        ("dtype", f"{dtypes}; stored in {'float64' if found.config.run.dtype == 'float64' else 'float32'}"),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids, {tokenizer.end_id} ends a document" if tokenizer else
         f"none: {found.tokenizer_missing}"),
        ("kept", f"keys of config.json without a meaning here: {unknown}" * bool(unknown)),
        ("run", nearby(out)),
        ("next", f"moetrain inspect {name}")]
    yield from (f"{label:10s}{text}" for label, text in rows if text)
    read_with = "" if tokenizer else " data.tokenizer=<its tokenizer.json>"
    yield f"{'':10s}moetrain train init.from={name} run.name=<name> data.path=<text>{read_with}"
    if tokenizer:
        yield f"{'':10s}moetrain eval {name} data.path=<held-out text>"
        yield f"{'':10s}moetrain generate {name} generate.prompt='…'"
