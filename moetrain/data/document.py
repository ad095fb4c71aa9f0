"""A document: a text with a domain, which stays on disk until it is asked for."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from moetrain.data.spool import Spool
from moetrain.data.text import cut


class Document(NamedTuple):
    """`blocks` gives the text again, as `data.text.blocks_of` does, or raises if it changed."""

    domain: str
    digest: bytes                   # sha256 of the text
    size: int                       # bytes
    blocks: Callable[[], Iterator[bytes]]


def text_document(domain: str, text: bytes) -> Document:
    """A document that is already in memory."""
    return Document(domain, hashlib.sha256(text).digest(), len(text), partial(cut, text))


def spooled_document(domain: str, text: bytes, spool: Spool) -> Document:
    """A document that is in memory and need not stay there."""
    again = partial(spool.blocks, spool.append(text), len(text))
    return Document(domain, hashlib.sha256(text).digest(), len(text), again)
