"""Chunks of a tensor: whether they hold every element of it exactly once.

A tensor's dims are cut one after the other. In dim d the beginnings and ends of the chunks cut [0, size) into
intervals; the chunks that hold an interval are looked at in dim d + 1. An interval that no chunk holds is
missing; one that two hold in the last dim is there twice. Chunks that form a grid, as parallel training
writes them, meet in one interval of each dim, so the work is linear in their number; for others it has a
bound.
"""

from collections.abc import Iterator, Sequence

from moetrain.interop.dcp.records import StoredChunk

MOST_VISITS = 64  # of each chunk; a grid visits each once a dim


class Unchecked(ValueError):
    """The chunks cross each other so often that they are not looked at any further."""


def faults(shape: tuple[int, ...], chunks: Sequence[StoredChunk]) -> Iterator[str]:
    """Yield what is wrong with the chunks of a tensor, as text: `[4:8, 0:16] is missing`.

    Args:
        shape: of the tensor.
        chunks: those that hold elements.
    """
    if 0 in shape:
        return
    visits = [MOST_VISITS * (len(chunks) + 16)]
    for word, region in _scan(shape, chunks, (), visits):
        yield f"[{', '.join(f'{begin}:{end}' for begin, end in region)}] is {word}"


def _scan(shape: tuple[int, ...], chunks: Sequence[StoredChunk], region: tuple[tuple[int, int], ...],
          visits: list[int]) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    """Yield (fault, region of it) for the part of a tensor that `region` bounds in its first dims."""
    dim = len(region)
    rest = tuple((0, size) for size in shape[dim:])
    if not chunks or dim == len(shape):
        if len(chunks) != 1:
            yield "there twice" if chunks else "missing", region + rest
        return
    if len(chunks) == 1 and chunks[0].sizes[dim:] == shape[dim:]:
        return
    spans = [(chunk.offsets[dim], chunk.offsets[dim] + chunk.sizes[dim]) for chunk in chunks]
    points = sorted({0, shape[dim], *(point for span in spans for point in span)})
    order = sorted(range(len(chunks)), key=spans.__getitem__)
    active: list[int] = []
    next = 0
    for begin, end in zip(points, points[1:]):
        active = [index for index in active if spans[index][1] > begin]
        while next < len(order) and spans[order[next]][0] <= begin:
            active.append(order[next])
            next += 1
        visits[0] -= len(active)
        if visits[0] < 0:
            raise Unchecked("its chunks overlap too often to be told apart")
        yield from _scan(shape, [chunks[index] for index in active], (*region, (begin, end)), visits)
