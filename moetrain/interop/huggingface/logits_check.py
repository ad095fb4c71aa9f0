"""Comparison of an exported folder, as stock transformers loads it, with the model that it was made of.

    max |delta| <= TOLERANCE * max(1, max |logit|)

over a batch of tokens, both in float32 on the CPU. Our weights are first rounded to the dtypes of the folder,
so that nothing but arithmetic is left to differ; what rounding changes is a figure of its own. transformers
runs no code of the folder, and nothing is fetched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.comm.mesh import lone_mesh
from moetrain.config.parallel_schema import ParallelConfig
from moetrain.config.schema import Config
from moetrain.config.trained_keys import without_starts
from moetrain.errors import CheckpointError
from moetrain.interop.huggingface.tensor_map import TensorMap
from moetrain.machine import machine_memory, total_memory
from moetrain.model.build import build_model
from moetrain.model.transformer import Transformer
from moetrain.parallel.state_shards import DTYPES, weights
from moetrain.routers.context import token_context
from moetrain.transform.reader import WeightsReader
from moetrain.units import decimal

TOLERANCE = 1e-3
PACKAGES = ("transformers", "safetensors", "tokenizers", "torch")
_COPIES = 3.0                # models in float32 that are in memory: ours, theirs, and what loading takes


def why_not(reader: WeightsReader) -> str | None:
    """Say why logits cannot be compared here; None where they can.

    Args:
        reader: the weights.
    """
    if find_spec("transformers") is None:
        return "transformers is not installed: pip install 'moetrain[hf]'"
    numbers = sum(torch.Size(reader.shape(name)).numel() for name in reader.names)
    needed, there = int(_COPIES * 4 * numbers), min(machine_memory(), total_memory())
    if needed > there:
        return (f"two models in float32 take {decimal(needed, 'B')}, and {decimal(there, 'B')} of memory are "
                "there")
    return None


def compare_logits(reader: WeightsReader, maps: Sequence[TensorMap], folder: Path, dtypes: Mapping[str, str],
                   tokens_BS: Tensor) -> dict[str, Any]:
    """Run a batch through both models.

    Args:
        reader: the weights that were exported.
        maps: how they were converted.
        folder: the folder, complete.
        dtypes: dtypes of its tensors by name, as safetensors spells them.
        tokens_BS: int64 [B, S], ids of the vocabulary.

    Returns:
        Figures of the comparison, for export_check.json.

    Raises:
        CheckpointError: transformers finds a tensor missing or unexpected, or the logits differ.
    """
    theirs, loading = _stock_logits(folder, tokens_BS)
    ours = _our_logits(reader, maps, dtypes, tokens_BS)
    delta, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    found = {"tokens": list(tokens_BS.shape), "max_abs_delta": delta, "max_abs_logit": largest,
             "tolerance": TOLERANCE * max(1.0, largest), "loss": _loss(ours, tokens_BS),
             "loss_transformers": _loss(theirs, tokens_BS), **loading}
    if not delta <= found["tolerance"]:                     # NaN is not, either
        raise CheckpointError(
            51, "the exported folder does not compute what the model computes", where=str(folder),
            why=f"logits of transformers {version('transformers')} differ by up to {delta:.3g}, where the "
                f"largest is {largest:.3g}; nothing was left behind",
            next="report it with the config.yaml of the run; verify=false writes the folder all the same")
    if any(dtype in ("BF16", "F16") for dtype in dtypes.values()):
        exact = _our_logits(reader, maps, {}, tokens_BS)
        found |= {"max_abs_delta_of_rounding": float((exact - ours).abs().max()),
                  "loss_before_rounding": _loss(exact, tokens_BS)}
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that took part, by name."""
    return {name: version(name) for name in PACKAGES if find_spec(name) is not None}


def _stock_logits(folder: Path, tokens_BS: Tensor) -> tuple[Tensor, dict[str, Any]]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
        attn_implementation="eager", output_loading_info=True)
    loading = {name: sorted(map(str, info.get(name) or ())) for name in
               ("missing_keys", "unexpected_keys", "mismatched_keys")}
    # Modules that predict further tokens lie behind the last layer; transformers has no place for them.
    loading["unexpected_keys"] = [name for name in loading["unexpected_keys"]
                                  if not _is_behind(name, model.config.num_hidden_layers)]
    if wrong := {name: keys for name, keys in loading.items() if keys}:
        raise CheckpointError(
            52, "transformers does not find the tensors that it expects", where=str(folder),
            why="; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in wrong.items()),
            next="report it with the config.yaml of the run; verify=false writes the folder all the same")
    with torch.no_grad():
        logits_BSV = model.eval()(tokens_BS, use_cache=False).logits.float()
    return logits_BSV, {**loading, "class": type(model).__name__}


def _is_behind(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer behind the last of so many."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and parts[2].isdecimal() and int(parts[2]) >= layers


def _our_logits(reader: WeightsReader, maps: Sequence[TensorMap], dtypes: Mapping[str, str],
                tokens_BS: Tensor) -> Tensor:
    config = _alone(reader.config)
    model = build_model(config, reader.vocab_size, lone_mesh(torch.device("cpu"))).eval()
    stored = {ours: dtypes[group.theirs[0]] for group in maps for ours in group.ours
              if group.theirs[0] in dtypes}
    with torch.no_grad():
        for shard in weights(model):
            values = reader[shard.name]
            shard.rows.copy_(values.to(DTYPES[stored[shard.name]]) if shard.name in stored else values)
        return _forward(model, tokens_BS)


def _forward(model: Transformer, tokens_BS: Tensor) -> Tensor:
    context = token_context(tokens_BS, seed=0, step=0, training=False, first=0,
                            sample_ids_B=torch.arange(len(tokens_BS)))
    return model(tokens_BS, context).logits_BSV.float()


def _alone(config: Config) -> Config:
    return without_starts(replace(config, parallel=ParallelConfig(),
                                  run=replace(config.run, dtype="float32", device="cpu")))


def _loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    """Cross-entropy of the next tokens, in nats."""
    return float(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()))
