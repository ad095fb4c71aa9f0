"""Second pass of a preparation: the texts of both splits to token shards."""

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

Note = Callable[[Iterator[bytes]], Iterator[bytes]]      # looks at the blocks of a text and passes them on


def write_tokens(folder: Path, parts: Split, encoder: Tokenizer, overlap: int,
                 progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Write both splits, and return what the dataset's description says of them.

    Held-out text comes first, so that the overlap is known after one pass over the training text. Its tokens
    are written with the bytes that each covers, except by the byte tokenizer, for which a token is a byte.

    Args:
        folder: folder of the shards.
        parts: the texts.
        encoder: the tokenizer.
        overlap: places of held-out text to look up in the training text at most; 0 for none.
        progress: called with the bytes done, and all of them.

    Returns:
        Entries of `dataset.json`: domains, counts by split, special tokens and overlap.
    """
    domains = tuple(sorted({*parts.train.by_domain(), *parts.heldout.by_domain()}))
    sizes = [members.bytes for members in (parts.heldout, parts.train)]
    measure = Overlap(heldout_bytes=sizes[0], limit=overlap) if overlap else None
    for path in folder.glob("heldout-*"):                # of a killed preparation; written again below
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
    """A function to call with the bytes done since the last call; it reports sums to `progress`."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done = min(done + more, size)
        if progress:
            progress(done, size)

    return advance


def _pass_over(members: Parts, written: int, note: Note | None, advance: Callable[[int], None]) -> None:
    """Skip texts whose tokens are already written. The overlap needs to see them again."""
    for part in islice(members, written):
        for _ in note(part.blocks()) if note else ():
            pass
        advance(part.end - part.start)


def _write(writer: SplitWriter, members: Parts, note: Note | None, encoder: Tokenizer, sizes: bool,
           advance: Callable[[int], None]) -> int:
    """Write the texts that are not written yet.

    Args:
        writer: writer of the split.
        members: all texts of the split.
        note: what also looks at the blocks of each text.
        encoder: the tokenizer.
        sizes: whether the bytes that each token covers are written, too.
        advance: called with bytes of text as they are done.

    Returns:
        Number of special tokens in them, end ids included.
    """
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
    """The blocks of each text, through `note` where given."""
    for part in members:
        yield note(part.blocks()) if note else part.blocks()
