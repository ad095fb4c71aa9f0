"""Which text is on which side: columns of documents against the rule, document by document."""

import hashlib
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings, strategies as st

from moetrain.data.corpus.split import FEW, LEAST_CUT, cap_domains, split, unique, without
from moetrain.data.reading.documents import Documents, Parts, spooled_document
from moetrain.data.reading.spool import Spool

Row = tuple[str, bytes, int, int]                            # domain, digest, first and last byte


class Text(NamedTuple):
    domain: str
    digest: bytes
    size: int


TEXTS = st.lists(st.tuples(st.sampled_from(("b", "a", "å", "B", "\U0001f600")), st.integers(0, 30),
                           st.integers(1, 3000)), min_size=1,
                 max_size=70)
SHARES = st.sampled_from((Fraction(1, 20), Fraction(1, 3), Fraction(9, 10), Fraction(1, 1000)))


def read(spool: Spool, rows: list[tuple[str, int, int]]) -> Documents:
    documents = Documents(spool)
    for domain, number, size in rows:
        documents.append(spooled_document(domain, (b"%d " % number) * size, spool))
    return documents


def shown(parts: Parts) -> list[Row]:
    return [(part.document.domain, part.document.digest, part.start, part.end) for part in parts]


def rule(texts: list[Text], share: Fraction, limit: int | None) -> tuple[list[Row], list[Row]]:
    """What split.py says in its first lines."""
    train, heldout = [], []
    for domain, group in groupby(texts, key=lambda text: text.domain):
        members = list(group)
        if len(texts) < min(FEW, 1 / share) or len(members) == 1:
            for text in members:
                held = int(text.size * share) if int(text.size * share) >= LEAST_CUT else 0
                train.append((domain, text.digest, 0, text.size - held))
                heldout += [(domain, text.digest, text.size - held, text.size)] * bool(held)
            continue
        digests = sorted(text.digest for text in members)
        chosen = {digest for digest in digests
                  if int.from_bytes(digest[:8]) % share.denominator < share.numerator} or {digests[0]}
        if len(chosen) == len(members):
            chosen.remove(digests[-1])
        for text in members:
            if text.digest in chosen:
                heldout.append((domain, text.digest, 0, min(text.size, limit or text.size)))
            else:
                train.append((domain, text.digest, 0, text.size))
    return train, heldout


@settings(max_examples=150, deadline=None)
@given(rows=TEXTS, share=SHARES, cap=st.none() | st.integers(1, 20_000),
       limit=st.none() | st.integers(1, 4000))
def test_both_sides_are_what_the_rule_says(tmp_path_factory, rows, share, cap, limit) -> None:
    with Spool(tmp_path_factory.getbasetemp() / "spool") as spool:
        documents = read(spool, rows)
        kept, dropped = unique(documents)
        listed = sorted((documents[row] for row in range(len(documents))),
                        key=lambda document: (document.domain, document.digest))
        seen: dict[bytes, Text] = {}
        for document in listed:
            seen.setdefault(document.digest, Text(document.domain, document.digest, document.size))
        assert shown(kept) == [(*text[:2], 0, text.size) for text in seen.values()]
        assert sorted(dropped.rows.tolist() + kept.rows.tolist()) == list(range(len(rows)))

        taken, sizes = [], dict.fromkeys(documents.names, 0)
        for text in seen.values():
            size = text.size if cap is None else min(text.size, cap - sizes[text.domain])
            if size > 0:
                taken.append(text._replace(size=size))
                sizes[text.domain] += size
        chosen = cap_domains(kept, cap)
        assert shown(chosen) == [(*text[:2], 0, text.size) for text in taken]
        assert chosen.by_domain() == {name: (sum(text.domain == name for text in taken), sizes[name])
                                      for name in sorted(sizes) if sizes[name]}
        assert tuple(map(shown, split(chosen, share=share, heldout_limit=limit))) == rule(taken, share, limit)


def test_a_text_of_the_other_side_is_taken_out_and_each_is_read_again_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\N{BYTE ORDER MARK}über\n".encode())
    with Spool(tmp_path) as spool:
        documents = read(spool, [("x", number, 5) for number in range(50)])
        others = read(spool, [("y", 7, 5), ("y", 99, 5)])
        left, also = without(unique(documents)[0], unique(others)[0])
        assert (len(left) == 49
                and [part.document.digest for part in also] == [hashlib.sha256(b"7 " * 5).digest()])
        found = Documents(spool)
        found.append(documents[3])
        file = documents[4]._replace(file=tmp_path / "a.txt",
                                     digest=hashlib.sha256("über\n".encode()).digest(), size=6)
        for document in (file, documents[5], file):
            found.append(document)
        assert ([b"".join(part.blocks()) for part in found.whole(np.arange(4))]
                == [b"3 " * 5, "über\n".encode(), b"5 " * 5, "über\n".encode()])
        assert [found[row].file for row in range(4)] == [None, tmp_path / "a.txt", None, tmp_path / "a.txt"]


def test_a_digest_that_ends_in_zeros_is_none_other(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        documents = Documents(spool)
        digests = [b"\1" * 30 + b"\0\0", b"\1" * 30 + b"\0\1", b"\1" * 31 + b"\0", bytes(32)]
        for digest in [*digests, digests[3]]:
            documents.append(spooled_document("a", b"text", spool)._replace(digest=digest))
        kept, dropped = unique(documents)
        assert [part.document.digest for part in kept] == sorted(digests) and dropped.rows.tolist() == [4]
