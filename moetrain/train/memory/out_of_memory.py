"""Error for training that runs out of memory: what this rank holds, the largest first, and what to change.

The sizes of parameters, gradients and optimizer state are measured. Those of activations are measured, too,
where train/memory/graph_memory.py did so, and otherwise estimated (`activation_bytes`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.errors import OutOfMemoryError
from moetrain.train.memory.graph_memory import max_copy_memory
from moetrain.train.state import Run
from moetrain.units import decimal

MAX_ITEMS = 4  # items that the error names
# From the operating system, the CUDA driver and cuBLAS.
_MESSAGES = ("allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")


@contextmanager
def out_of_memory_named(run: Run) -> Iterator[None]:
    """Turn a failed allocation, of torch on any device or of Python, into an OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise describe(run, error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation.

    torch's CPU allocator and CUDA's libraries have no class for it, so their messages are compared.
    """
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or any(words in str(error) for words in _MESSAGES))


def describe(run: Run, error: BaseException) -> OutOfMemoryError:
    """Return the error for the user."""
    items = largest_items(run)
    wanted = re.search(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", str(error), re.IGNORECASE)
    size = f" of {wanted[1]} {wanted[2]}" if wanted else ""
    if wanted and wanted[2] == "bytes":
        size = f" of {decimal(float(wanted[1]), 'B')}"
    held = ", ".join(f"{name} {decimal(amount, 'B')}" for name, amount in items[:MAX_ITEMS])
    return OutOfMemoryError(
        1,
        f"out of memory on {run.mesh.device.type} in step {run.state.step + 1}: an allocation{size} failed",
        where=f"rank {run.mesh.rank} of {run.mesh.size}",
        why=f"the largest items of a rank: {held}", next=advice(run, items[0][0]))


def largest_items(run: Run) -> list[tuple[str, float]]:
    """List (name, bytes) of what this rank holds, the largest first."""
    parameters = list(run.state.model.parameters())
    values = (value for state in run.state.optimizer.state.values() for value in state.values())
    moments = sum(local(value).nbytes for value in values if isinstance(value, Tensor))
    weights = sum(local(parameter).nbytes for parameter in parameters)
    gradients = sum(local(parameter).nbytes for parameter in parameters if parameter.requires_grad)
    copies = max_copy_memory(run)
    rule = run.objective.pool
    kept = run.loader.micro_batches if run.graphs.kept and rule is not None and rule.mode == "exact" else 1
    blocks, logits = activation_bytes(run)
    blocks = max(run.graphs.graph - logits, 0) if run.graphs.graph else blocks
    several = f"{kept} micro-batch{'es' * (kept > 1)}"
    items = [("parameters", weights), ("gradients", gradients), ("optimizer state", moments),
             (f"activations of {several} about", kept * blocks),
             (f"logits of {several} about", kept * logits),
             ("copies of experts and their gradients", copies.copies + copies.sums)]
    return sorted((item for item in items if item[1]), key=lambda item: -item[1])


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def activation_bytes(run: Run) -> tuple[float, float]:
    """Estimate the bytes that a micro-batch keeps for backward, in the blocks and as logits.

    In the dtype of the computation a token keeps 8 D in attention, 2 D and 3 F for each expert
    that it visits, and V each for logits and their float32 probabilities. Blocks that are
    recomputed whole keep only D.
    """
    sizes, train = run.config.model, run.config.train
    tokens = train.per_forward(run.mesh["batch"].size) * train.seq_len
    element = run.state.model.dtype.itemsize
    model = run.state.model
    layers = model.blocks
    visits = [(model.routers[router].max_slots() + sizes.num_shared_experts, routed.bank.form.expert_dim)
              for name, routed in model.banks.items() for router in model.feeds[name]]
    attention, in_expert, out_expert = {"none": (8, 2, 3), "selective": (5, 1, 2), "full": (1, 0, 0)}[
        train.activation_checkpointing]
    kept = (len(layers) * attention * sizes.dim
            + sum(experts * (in_expert * sizes.dim + out_expert * width) for experts, width in visits))
    at_once = min(tokens, train.head_chunk) if train.head_chunk else tokens
    heads = 1 if train.head_chunk else 1 + len(model.mtp)
    return tokens * element * kept, heads * at_once * run.state.model.embed.shape[0] * (element + 4)


def advice(run: Run, largest: str) -> str:
    """Advice that makes the largest item smaller; the same command with it resumes the run."""
    train, ranks = run.config.train, run.mesh["batch"].size
    own = train.global_batch // ranks
    smaller = max((size for size in range(1, train.per_forward(ranks)) if own % size == 0), default=None)
    activations = [f"train.micro_batch={smaller}"] if smaller else []
    if largest.startswith("logits") and not train.head_chunk:
        activations.insert(0, "train.head_chunk=1024")
    elif train.activation_checkpointing != "full":
        activations.append("train.activation_checkpointing=full")
    if run.graphs.kept and run.loader.micro_batches > 1 and not train.count_pass:
        activations.append("train.count_pass=true")
    spread = ("more GPUs or machines with parallel=ep_fsdp, "
              "which shards parameters, gradients and optimizer state")
    options = activations if largest.startswith(("activations", "logits")) else [*activations[:1], spread]
    return f"the same command with {' or '.join(options or [spread])}; it goes on from the newest save"
