"""The tokens of a split of texts, in shards: the second pass of a preparation."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moetrain.data.corpus.overlap import Overlap
from moetrain.data.corpus.split import Split
from moetrain.data.preparation.split_writer import SplitWriter
from moetrain.data.reading.documents import Part, Parts
from moetrain.data.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Note = Callable[[Iterator[bytes]], Iterator[bytes]]      # hands the blocks of a text on and looks at them


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
    domains = tuple(sorted({*parts.train.by_domain(), *parts.heldout.by_domain()}))
    sizes = [members.bytes for members in (parts.heldout, parts.train)]
    measure = Overlap(heldout_bytes=sizes[0], limit=overlap) if overlap else None
    for path in folder.glob("heldout-*"):  # of a preparation that was killed: soon written again
        path.unlink()
    advance = _advance(progress, sum(sizes))
    counts, special = {}, 0
    for name, members, note in (("heldout", parts.heldout, measure and measure.heldout),
                                ("train", parts.train, measure and measure.train)):
        with_sizes = name == "heldout" and encoder.content is not None
        writer = SplitWriter(folder=folder, split=name, vocab_size=encoder.vocab_size, domains=domains,
                             sizes=with_sizes, resumable=name == "train")
        if writer.written:
            log.info("an interrupted preparation has written %d of %d documents: they stay", writer.written,
                     len(members))
            special += sum(map(encoder.count_special, writer.finished())) if encoder.parse_special else 0
        _pass_over(members, writer.written, note, advance)
        special += _write(writer, members, note, encoder, with_sizes, advance)
        counts[name] = writer.counts
    advance(sum(sizes))
    share = measure and measure.share()
    documents_written = sum(domain["documents"] for split in counts.values() for domain in split.values())
    return {"domains": list(domains), "train": counts["train"], "heldout": counts["heldout"],
            "special_tokens": max(special - documents_written, 0) if encoder.parse_special else None,
            "heldout_overlap": share.value if share else None,
            "overlap_windows": share.windows if share else 0, "overlap_every": share.every if share else 0}


def _advance(progress: Callable[[int, int], None] | None, size: int) -> Callable[[int], None]:
    """What is called with the bytes that were done since."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done = min(done + more, size)
        if progress:
            progress(done, size)

    return advance


def _pass_over(members: Parts, written: int, note: Note | None, advance: Callable[[int], None]) -> None:
    """Leave out the texts whose tokens are written. The overlap wants to see them again."""
    for part in islice(members, written):
        for _ in note(part.blocks()) if note else ():
            pass
        advance(part.end - part.start)


def _write(writer: SplitWriter, members: Parts, note: Note | None, encoder: Tokenizer, sizes: bool,
           advance: Callable[[int], None]) -> int:
    """Write what is not written yet, and return how many special tokens are in it."""
    numbers = {domain: number for number, domain in enumerate(writer.counts)}
    owners, domain, size, special = members.starting_at(writer.written), None, 0, 0
    for encoded in encoder.encode_documents(_blocks(members.starting_at(writer.written), note), sizes=sizes):
        if domain is None:
            domain = numbers[next(owners).document.domain]
        writer.extend(encoded.ids, domain, encoded.sizes)
        size += encoded.text_bytes
        special += encoder.count_special(encoded.ids) if encoder.parse_special else 0
        if encoded.last:
            writer.end_document(domain, size)
            domain, size = None, 0
        advance(encoded.text_bytes)
    writer.flush()
    return special


def _blocks(members: Iterator[Part], note: Note | None) -> Iterator[Iterator[bytes]]:
    for part in members:
        yield note(part.blocks()) if note else part.blocks()
