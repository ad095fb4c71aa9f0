"""Inspection of data that is tokens already, before anything is trained on it.

The files are opened as training opens them, so every error is one of training. Nothing is written; indexes
that an earlier start has kept are used (`pretokenized/token_indexes.py`). `inspection.py` does the same for
text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.schema import Config
from moetrain.data.account.ledgers import HELD, TRAINED
from moetrain.data.batches.token_dataset import TokenDataset
from moetrain.data.corpus.selection import Progress
from moetrain.data.inspection import SHOWN, SHOWN_TOKENS, Inspection
from moetrain.data.loader import open_tokens, token_dataset
from moetrain.data.preparation.by_fingerprint import prepared_place
from moetrain.data.preparation.prepared_dataset import DESCRIPTION, Prepared, TokenStream, total
from moetrain.data.pretokenized.account import TokenAccount
from moetrain.data.pretokenized.token_files import FileStream, TokenFiles
from moetrain.data.pretokenized.token_indexes import TokenIndexes
from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.data.tokens.shards import open_shard
from moetrain.errors import DataError

Stream = TokenStream | FileStream


def inspect_tokens(config: Config, run_dir: Path, progress: Progress | None = None) -> Inspection:
    """Read the tokens that a config names.

    `found` is None if training would refuse them; `error` says why.
    """
    data, account = config.data, TokenAccount()
    assert data.kind in ("tokens", "memmap", "megatron"), data.kind
    try:
        opened = open_tokens(data, TokenIndexes(prepared_place(data, run_dir), progress=progress), account)
        if isinstance(opened, Prepared):
            _enter_files(account, opened)
        else:
            account.fill_in(opened.members, opened.domains)
        dataset = token_dataset(config, opened)
    except DataError as error:
        return Inspection(account.ledgers, None, error)
    return Inspection(account.ledgers, _described(config, opened, dataset, account), None)


def _enter_files(account: TokenAccount, prepared: Prepared) -> None:
    """Enter the files of a prepared folder in the account."""
    folder, beside = prepared.folder, {DESCRIPTION: "description", "tokenizer.json": "tokenizer"}
    shards, sizes = ({name: HELD if name.startswith("heldout-") else TRAINED
                      for name in prepared.description.get(what, {})}
                     for what in ("shards", "sizes"))
    files = shards | sizes | dict.fromkeys((name for name in beside if (folder / name).is_file()), "")
    account.add("data.path", str(folder), read=[(folder / name, side) for name, side in files.items()])
    for name in files:
        entry = account.note(folder / name, beside.get(name, "bytes of each token"))
        if name in shards:
            shard = open_shard(folder / name, verify=False)
            entry.format = f"prepared shard, {shard.tokens.layout.dtype.name}"
            entry.documents, entry.tokens = shard.documents, len(shard.tokens)
            entry.heldout = len(shard.tokens) * (shards[name] == HELD)


def _described(config: Config, opened: Prepared | TokenFiles, dataset: TokenDataset,
               account: TokenAccount) -> dict[str, Any]:
    """The findings as a record."""
    sides = {"train": dataset.train_stream, "heldout": dataset.heldout_stream}
    a_step = config.train.global_batch * config.train.seq_len
    epochs = dataset.epochs(config.run.steps * config.train.global_batch)
    counts = {side: _counts(stream, len(dataset.domains)) for side, stream in sides.items()}
    samples = epochs * [tokens for _, tokens in counts["train"]]
    domains = {name: {**{side: dict(zip(("documents", "tokens"), counts[side][number])) for side in sides},
                      "epochs": float(epochs[number]), "share": float(samples[number] / samples.sum())}
               for number, name in enumerate(dataset.domains)}
    train = sides["train"].size
    return {"kind": config.data.kind, "fingerprint": dataset.fingerprint,
            "account": {"files": {ledger.key: ledger.record() for ledger in account.ledgers}},
            "domains": domains,
            "tokens": {"train": train, "heldout": sides["heldout"].size,
                       "bytes_per_token": _bytes_per_token(opened), "estimated": False},
            "steps": config.run.steps, "tokens_per_step": a_step, "epochs": config.run.steps * a_step / train,
            "mixture": None if _shares(opened) else config.data.mixture,
            "weights": _shares(opened) or dict(config.data.weights),
            "tokenizer": _tokenizer_name(config, opened), "vocab_size": dataset.vocab_size,
            "end_token": _end_token(opened), "documents": list(_documents(dataset, opened))}


def _shares(opened: Prepared | TokenFiles) -> dict[str, float]:
    """Weights of a blend, by domain; empty if the data has none of its own."""
    return dict(opened.shares or {}) if isinstance(opened, TokenFiles) else {}


def _tokenizer_name(config: Config, opened: Prepared | TokenFiles) -> str:
    if isinstance(opened, TokenFiles):
        return config.data.tokenizer
    return "bytes" if opened.tokenizer.identity == "bytes" else str(opened.folder / "tokenizer.json")


def _bytes_per_token(opened: Prepared | TokenFiles) -> float | None:
    """Bytes of text for each token that is no end id; None if unknown, as ids alone do not tell."""
    if isinstance(opened, TokenFiles):
        return None
    counts = total(opened.description["train"])
    tokens = counts["tokens"] - counts["documents"]
    return counts["bytes"] / tokens if tokens else None


def _end_token(opened: Prepared | TokenFiles) -> dict[str, Any]:
    """The id that closes documents, and the share of them that are known to end in it."""
    if isinstance(opened, Prepared):                         # `prepare` puts it behind every document
        return {"id": opened.tokenizer.end_id, "share": 1.0}
    files = [member.file.index for member in opened.members]
    closed = sum(index.ending.share * index.documents for index in files
                 if index.ending and index.ending.id == opened.end_id)
    share = closed / max(sum(index.documents for index in files), 1)
    return {"id": opened.end_id, "share": None if opened.end_id is None else float(share)}


def _counts(stream: Stream, domains: int) -> list[tuple[int, int]]:
    """Documents and tokens of each domain in a stream."""
    bounds = np.array([stream.domain_range(number) for number in range(domains)]).reshape(-1, 2)
    documents = np.searchsorted(stream.document_starts, bounds)
    return list(zip(np.diff(documents)[:, 0].tolist(), np.diff(bounds)[:, 0].tolist()))


def _documents(dataset: TokenDataset, opened: Prepared | TokenFiles) -> Iterator[dict[str, Any]]:
    """Yield the beginnings of some training documents.

    They come from as many domains as there are, the largest first.
    """
    stream, counts = dataset.train_stream, _counts(dataset.train_stream, len(dataset.domains))
    first = np.searchsorted(stream.document_starts,
                            [stream.domain_range(number)[0] for number in range(len(counts))])
    order = sorted((number for number, (documents, _) in enumerate(counts) if documents),
                   key=lambda number: -counts[number][1])
    places = [(turn, number) for turn in range(SHOWN) for number in order if turn < counts[number][0]][:SHOWN]
    turns = max(turn for turn, _ in places) + 1
    end_id = opened.end_id if isinstance(opened, TokenFiles) else opened.tokenizer.end_id
    for turn, number in places:                              # documents spread evenly over the domain
        document = int(first[number]) + turn * counts[number][0] // min(turns, counts[number][0])
        begin = int(stream.document_starts[document])
        end = stream.size
        if document + 1 < len(stream.document_starts):
            end = int(stream.document_starts[document + 1])
        ids = stream.read(begin, min(end - begin, SHOWN_TOKENS)).tolist()
        yield _shown(dataset.domains[number], ids, end - begin, end_id, dataset.tokenizer)


def _shown(domain: str, ids: list[int], length: int, end_id: int | None,
           tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The beginning of a document, as ids and as text if a tokenizer is known."""
    ended = len(ids) == length and bool(ids) and ids[-1] == end_id
    text = None if tokenizer is None else tokenizer.decode(ids[:-1] if ended else ids)
    return {"domain": domain, "length": length, "tokens": ids, "text": text, "complete": len(ids) == length,
            "ended": ended}
