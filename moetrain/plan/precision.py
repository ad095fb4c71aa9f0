"""Which dtype a run computes in, where run.dtype=auto leaves it open.

    a run that goes on   the one that it was trained with, on whatever device
    CUDA                 bfloat16 where every rank's GPU computes it, otherwise float32 (never run on a GPU yet)
    CPU                  float32: at the sizes that CPUs train, casts cost more than smaller numbers save

Parameters, gradients, moments and sums stay float32 or better whatever it is.
"""


def choose_dtype(asked: str, device: str, *, computes_bfloat16: bool, recorded: str | None = None) -> str:
    """`float32`, `bfloat16` or `float64`. recorded: of the run that goes on."""
    if asked != "auto":
        return asked
    if recorded is not None:
        return recorded
    return "bfloat16" if device == "cuda" and computes_bfloat16 else "float32"
