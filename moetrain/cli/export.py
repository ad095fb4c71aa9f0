"""moetrain export <run or checkpoint> out=DIR [--json]: write a model as a folder that others load.

    family=mixtral     the public family; by default the one that holds the model exactly
    dtype=bfloat16     float32, bfloat16, float16 or float64; by default that of the checkpoint, and for a
                       model that was imported that of its folder
    shard_size=5GB     bytes of a file at most
    verify=false       do not compare logits

DIR holds safetensors, config.json, the tokenizer, generation_config.json, a model card (README.md) and
export_check.json. Every tensor is accounted for. Where transformers is installed, it loads the folder, and
its logits on held-out text are compared with ours. DIR must not exist; it is whole, or not there. <run> is a
name or a directory; of a run the newest checkpoint is exported. Nothing is fetched.

A model that no family holds exactly is refused, and the options in the way are named.
"""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moetrain.cli.inspect import named
from moetrain.cli.key_words import Words, byte_count, one_of, read_words
from moetrain.cli.progress import byte_progress
from moetrain.errors import ConfigError
from moetrain.files import nearby
from moetrain.units import decimal

if TYPE_CHECKING:
    from moetrain.interop.huggingface.run_export import Exported

KEYS = {"out": "DIR", "family": "mixtral", "dtype": "bfloat16", "shard_size": "5GB", "verify": "false"}
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Request(NamedTuple):
    """What the command line asks for."""

    checkpoint: Path
    out: Path
    family: str | None
    dtype: str | None
    shard_bytes: int
    verify: bool


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    words = read_words("export", argv, KEYS, sections=("run",))
    request = _request(words)
    from moetrain.interop.huggingface.run_export import export_run
    from moetrain.report.model_card import model_card, pictures

    def say(line: str) -> None:
        if not words.as_json:
            print(line, flush=True)

    with byte_progress() as progress:
        found = export_run(
            request.checkpoint, request.out, family=request.family, dtype=request.dtype,
            shard_bytes=request.shard_bytes, verify=request.verify, card=model_card,
            pictures=pictures(request.checkpoint.parents[1]), say=say, progress=progress)
    if words.as_json:
        print(json.dumps({"out": str(request.out), **found.check}, ensure_ascii=False))
    else:
        print("\n".join(_lines(request.out, found)))
    return 0


def _request(words: Words) -> Request:
    checkpoint = named([*words.names, *words.others], "export")[-1]
    keys = words.keys
    if "out" not in keys:
        raise ConfigError(319, "export does not say where to", where="the command line",
                          why="a folder is written", next="out=<a folder that does not exist yet>")
    return Request(
        checkpoint, Path(keys["out"]), keys.get("family"),
        one_of("dtype", keys["dtype"], DTYPES) if "dtype" in keys else None,
        byte_count("shard_size", keys.get("shard_size", "5GB")),
        one_of("verify", keys.get("verify", "true"), ("true", "false")) == "true")


def _lines(out: Path, found: "Exported") -> list[str]:
    check = found.check
    tensors, logits = check["tensors"], check["logits"]
    files = f"{tensors['files']} file{'s' * (tensors['files'] > 1)}"
    rows = [("folder", f"{nearby(out)}: {tensors['written']:,} tensors in {files}, "
                       f"{decimal(tensors['bytes'], 'B')}, {check['dtype']}"),
            ("tensors", f"all {tensors['read']:,} of the checkpoint written, none left over"
                        + (f"; {tensors['preserved']:,} of the imported folder beside them"
                           if tensors["preserved"] else "")),
            ("tokenizer", check["tokenizer"]),
            ("logits", _logits_line(logits)),
            ("next", _example(out))]
    return [f"{label:10s}{text}" for label, text in rows]


def _logits_line(logits: dict[str, Any]) -> str:
    if "not_compared" in logits:
        return f"not compared: {logits['not_compared']}"
    sequences, length = logits["tokens"]
    text = (f"{logits['class']} of transformers {logits['version']} loads it, no tensor missing or "
            f"unexpected: max |delta| {logits['max_abs_delta']:.2g} of {logits['max_abs_logit']:.3g} "
            f"on {sequences} x {length} tokens: {logits['text']}")
    if "max_abs_delta_of_rounding" in logits:
        text += f"; rounding moves them by up to {logits['max_abs_delta_of_rounding']:.2g}"
    return text


def _example(out: Path) -> str:
    """A command that generates with the folder, as it is typed in a shell."""
    script = f"from transformers import pipeline; print(pipeline('text-generation', {str(out)!r})('def '))"
    return f'python -c "{script}"' if not set('"\\$`!') & set(script) else f"python -c {shlex.quote(script)}"
