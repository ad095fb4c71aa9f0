"""Copy of a device's numbers to the host, for which the host waits: how a layer reads its counts.

This is an op of its own, so that activation checkpointing and count passes can save its result
(model/activation_checkpointing.py): numbers that were read once in a step are not read again in backward.
"""

from torch import Tensor

from moetrain.ops.extension import define


def _read(numbers: Tensor) -> Tensor:
    return numbers.to("cpu", copy=True)


_read_host = define("read_host(Tensor numbers) -> Tensor", reference=_read,
                    fake=lambda numbers: numbers.new_empty(numbers.shape, device="cpu"))


def read_host(numbers: Tensor) -> Tensor:
    """Copy a tensor to the host and wait for it. No gradient."""
    return _read_host(numbers)
