"""Dtype of the computation where `run.dtype=auto` leaves it open.

    resumed run   the dtype that it was trained with, on any device
    CUDA          bfloat16 where every rank's GPU computes it, otherwise float32 (never run on a GPU yet)
    CPU           float32: at the sizes that CPUs train, casts cost more than smaller numbers save

Parameters, gradients, moments and sums stay float32 or better in any case.
"""


def choose_dtype(asked: str, device: str, *, computes_bfloat16: bool, recorded: str | None = None) -> str:
    """Choose the dtype of the computation.

    Args:
        asked: value of `run.dtype`; anything but `auto` is taken as it is.
        device: type of the device, `cuda` or `cpu`.
        computes_bfloat16: whether every rank's GPU computes bfloat16.
        recorded: dtype of the run that is resumed, if one is.

    Returns:
        `float32`, `bfloat16` or `float64`.
    """
    if asked != "auto":
        return asked
    if recorded is not None:
        return recorded
    return "bfloat16" if device == "cuda" and computes_bfloat16 else "float32"
