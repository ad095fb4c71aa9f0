"""Megatron-Core 0.16 without a GPU: replacements for what its MoE layer calls of CUDA.

It changes torch for the whole process, so it is for processes that do nothing else. Streams need no waiting,
the CPU is the current device, and counts that the dispatcher copies to the host are there already.
"""

import contextlib
import warnings

import torch


class Stream:
    """Stand-in for a stream and for an event: all work is finished whenever it is queried."""

    def __getattr__(self, name: str):
        return lambda *arguments, **named: self

    def __eq__(self, other: object) -> bool:
        return True


def pretend() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = cuda.Event = lambda *arguments, **named: Stream()
    cuda.current_stream = lambda *arguments: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("synchronize", "set_device", "manual_seed", "set_rng_state"):
        setattr(cuda, name, lambda *arguments, **named: None)
    torch.Tensor.cuda = lambda self, *arguments, **named: self
    torch.Tensor.record_stream = lambda self, stream: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    # Defined only where Transformer Engine is installed, but used everywhere.
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor)
