"""The small files of an exported folder: config.json, generation_config.json, and what the import kept.

    read_origin        what a run keeps of the folder that it was imported from (runs/origin.py)
    config_json        config.json, with dtype and end token
    generation_json    generation_config.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.config.schema import Config
from moetrain.files import read_json
from moetrain.interop.huggingface.families.base import Family
from moetrain.runs.origin import RECORD, origin_of

GENERATION = "generation_config.json"
# Dtypes of weights: name on the command line and in config.json, and safetensors' spelling.
DTYPE_WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_SPELLED = ("torch_dtype", "dtype")


class Origin(NamedTuple):
    """What a run keeps of a public folder.

    Attributes:
        folder: where it lies.
        config: its config.json.
        family: its model_type.
        spelling: spelling of its names (`Family.spellings`).
        dtype: dtype of most of its tensors, as safetensors spells it.
        dtypes: dtypes of the others, by name.
    """

    folder: Path
    config: dict[str, Any]
    family: str
    spelling: str
    dtype: str
    dtypes: dict[str, str]


def read_origin(run_dir: Path) -> Origin | None:
    """Read what a run keeps of the folder that it was imported from; None for other runs."""
    folder = origin_of(run_dir)
    if folder is None:
        return None
    record = read_json(folder / RECORD, limit=1 << 28)
    config = read_json(folder / "config.json", limit=1 << 24)
    return Origin(folder, config, record["model_type"], record["spelling"], record["dtype"], record["dtypes"])


def config_json(family: Family, config: Config, vocab_size: int, dtype: str, end_id: int | None,
                origin: Origin | None) -> dict[str, Any]:
    """Return the config.json to write.

    Args:
        family: the family.
        config: config of the run.
        vocab_size: V, rows of the embedding.
        dtype: a key of DTYPE_WORDS.
        end_id: id of the token that ends a document, if there is one.
        origin: what the run keeps of the folder that it was imported from.
    """
    written = family.write_config(config, vocab_size, origin and origin.config)
    written.pop("quantization_config", None)                 # the weights are written in a dtype of their own
    spelled = [name for name in _SPELLED if name in written] or [_SPELLED[0]]
    written |= {name: dtype for name in spelled if origin is None or _word(written.get(name)) != dtype}
    if origin is None:                                       # defaults of the classes would name other ids
        written |= {"bos_token_id": None, "eos_token_id": end_id, "pad_token_id": None}
    return written


def generation_json(config: Config, end_id: int | None, origin: Origin | None) -> dict[str, Any] | None:
    """Return the generation_config.json to write; None where the imported folder had none.

    Args:
        config: config of the run.
        end_id: id of the token that ends a document, if there is one.
        origin: what the run keeps of the folder that it was imported from.
    """
    if origin is not None:
        path = origin.folder / GENERATION
        return read_json(path) if path.is_file() else None
    wanted = config.generate
    sampling = ({"do_sample": True, "temperature": wanted.temperature, "top_p": wanted.top_p}
                if wanted.temperature else {"do_sample": False})
    return {"eos_token_id": end_id, **sampling, "max_new_tokens": wanted.tokens}


def most_common(dtypes: Mapping[str, str]) -> str:
    """Return the dtype of most tensors, as safetensors spells it."""
    return max(sorted(set(dtypes.values())), key=list(dtypes.values()).count)


def _word(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value
