"""The tokens of a split of texts, in shards: the second pass of a preparation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moetrain.data.overlap import Overlap
from moetrain.data.prepared import SplitWriter
from moetrain.data.split import Part, Split
from moetrain.data.tokenizer import Tokenizer


def write_tokens(folder: Path, parts: Split, encoder: Tokenizer, overlap: int,
                 progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Write both sides, and return what the description of the dataset says of them.

    Held-out text comes first, so that the overlap is known in one pass over the training text. Its tokens are written with the
    bytes that each covers; that a byte is a token of its own needs no file.

    Args:
        folder: where the shards go.
        parts: the texts.
        encoder: the tokenizer.
        overlap: places of held-out text to look up in the training text at most.
        progress: called with the bytes done, and all of them.
    """
    domains = tuple(sorted({part.document.domain for part in parts.train + parts.heldout}))
    numbers = {domain: number for number, domain in enumerate(domains)}
    sizes = [sum(part.end - part.start for part in members) for members in (parts.heldout, parts.train)]
    measure = Overlap(heldout_bytes=sizes[0], limit=overlap) if overlap else None
    counts, done, special = {}, 0, 0
    for name, members, note in (("heldout", parts.heldout, measure and measure.heldout),
                                ("train", parts.train, measure and measure.train)):
        with_sizes = name == "heldout" and encoder.content is not None
        writer = SplitWriter(folder=folder, split=name, vocab_size=encoder.vocab_size, domains=domains, sizes=with_sizes)
        owners, domain, size = iter(members), None, 0
        for encoded in encoder.encode_documents(_blocks(members, note), sizes=with_sizes):
            if domain is None:
                domain = numbers[next(owners).document.domain]
            writer.extend(encoded.ids, domain, encoded.sizes)
            size, done = size + encoded.text_bytes, done + encoded.text_bytes
            special += encoder.count_special(encoded.ids) if encoder.parse_special else 0
            if encoded.last:
                writer.end_document(domain, size)
                domain, size = None, 0
            if progress:
                progress(done, sum(sizes))
        writer.flush()
        counts[name] = writer.counts
    if progress:
        progress(sum(sizes), sum(sizes))
    share = measure and measure.share()
    documents_written = sum(domain["documents"] for split in counts.values() for domain in split.values())
    return {"domains": list(domains), "train": counts["train"], "heldout": counts["heldout"],
            "special_tokens": max(special - documents_written, 0) if encoder.parse_special else None,
            "heldout_overlap": share.value if share else None,
            "overlap_windows": share.windows if share else 0, "overlap_every": share.every if share else 0}


def _blocks(members: list[Part], note: Callable[[Iterator[bytes]], Iterator[bytes]] | None) -> Iterator[Iterator[bytes]]:
    for part in members:
        yield note(part.blocks()) if note else part.blocks()
