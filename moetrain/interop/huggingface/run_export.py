"""Export of a run: weights, tokenizer, settings, card and check, in one folder that is whole or not there.

    1. the family that holds the model exactly, or a refusal        choice.py
    2. the tokenizer, and a batch of held-out text                  the run's own, beside its data
    3. weights, layer by layer                                      exporting.py
    4. config.json, generation_config.json, tokenizer, card         export_files.py, tokenizer_files.py
    5. logits of stock transformers beside ours                     logits_check.py
    6. export_check.json, and only then the folder gets its name
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain import __version__
from moetrain.config.schema import Config
from moetrain.data.corpus.builtin import builtin_documents
from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import read_bytes, read_json
from moetrain.interop.huggingface.choice import choose_family
from moetrain.interop.huggingface.export_files import (
    DTYPE_WORDS,
    GENERATION,
    Origin,
    config_json,
    generation_json,
    read_origin,
)
from moetrain.interop.huggingface.exporting import export_weights
from moetrain.interop.huggingface.families.base import Family
from moetrain.interop.huggingface.folder import HuggingFaceFolder, open_folder
from moetrain.interop.huggingface.folder_writer import FolderWriter
from moetrain.interop.huggingface.importing import PRESERVED
from moetrain.interop.huggingface.logits_check import compare_logits, versions, why_not
from moetrain.interop.huggingface.tokenizer_files import LARGEST_FILE, tokenizer_files
from moetrain.parallel.state_shards import DTYPES
from moetrain.train.evaluation.trained import RecordedRun, open_trained, prepared_tokenizer, recorded_run
from moetrain.transform.reader import WeightsReader, open_weights

CHECK, CARD = "export_check.json", "README.md"
# Is told the bytes of all; returns what is told the bytes done.
Progress = Callable[[int], Callable[[int], None]]
# The batch whose logits are compared.
SEQUENCES, LENGTH = 4, 128


def no_progress(total: int) -> Callable[[int], None]:
    """Show nothing."""
    return lambda count: None


class Exported(NamedTuple):
    """A folder that was written.

    Attributes:
        family: its family.
        check: content of its export_check.json.
    """

    family: Family
    check: dict[str, Any]


class CardFacts(NamedTuple):
    """What a model card is written from.

    Attributes:
        name: of the folder.
        config: config of the run.
        run_dir: its directory.
        architecture: class in transformers.
        check: content of export_check.json.
        step: of the checkpoint.
        tokens: trained on until then.
        parameters: all, and those that a token uses.
        vocab_size: rows of the embedding.
        context: positions.
        imported: config.json of the folder that the weights were first imported from, if they were.
        pictures: files of pictures beside the card.
    """

    name: str
    config: Config
    run_dir: Path
    architecture: str
    check: dict[str, Any]
    step: int
    tokens: int
    parameters: tuple[int, int]
    vocab_size: int
    context: int
    imported: dict[str, Any] | None
    pictures: list[str]


def export_run(checkpoint: Path, out: Path, *, card: Callable[[CardFacts], str], family: str | None = None,
               dtype: str | None = None, shard_bytes: int = 5 * 10**9, verify: bool = True,
               pictures: Iterable[Path] = (), say: Callable[[str], None] = lambda line: None,
               progress: Progress = no_progress) -> Exported:
    """Write the folder of a checkpoint.

    Args:
        checkpoint: directory of the checkpoint, in that of its run.
        out: the folder, which must not exist.
        card: writes the model card.
        family: model_type of the family; None: the one that holds the model.
        dtype: a key of DTYPE_WORDS; None: that of the imported folder, or of the checkpoint.
        shard_bytes: bytes of a shard at most.
        verify: whether to compare logits.
        pictures: files that the card shows.
        say: is told what is done, a line at a time.
        progress: is told the bytes to write; returns what is told the bytes written.

    Raises:
        ConfigError: no family holds the model, or `out` exists.
        CheckpointError: the checkpoint is damaged, or the folder does not compute what it computes.
    """
    with open_weights(checkpoint) as reader:
        run_dir = reader.directory.parents[1]
        config, origin = reader.config, read_origin(run_dir)
        chosen = choose_family(config, family, origin and origin.family)
        if origin is not None and origin.family != chosen.model_type:
            origin = None                                    # another family: nothing of the folder is kept
        say(f"{'family':10s}{chosen.model_type} ({chosen.architecture})")
        run = recorded_run(config, reader.directory)
        tokenizer = _tokenizer(run)
        with FolderWriter(out, shard_bytes) as writer:
            check = _write(writer, reader, chosen, config, origin, tokenizer, dtype, progress)
            copied = [path for path in pictures if path.is_file()]
            for path in copied:
                writer.write(path.name, read_bytes(path, limit=LARGEST_FILE))
            check["logits"] = _compared(run, reader, chosen, origin, writer.folder, tokenizer, verify)
            facts = CardFacts(
                out.name, config, run_dir, chosen.architecture, check, reader.manifest.values["step"],
                reader.manifest.values["tokens"], parameter_counts(reader), reader.vocab_size,
                read_json(writer.folder / "config.json", limit=LARGEST_FILE)["max_position_embeddings"],
                origin and origin.config, [path.name for path in copied])
            writer.write(CARD, card(facts))
            writer.write(CHECK, _json(check))
    return Exported(chosen, check)


def _write(writer: FolderWriter, reader: WeightsReader, family: Family, config: Config, origin: Origin | None,
           tokenizer: Tokenizer | None, dtype: str | None,
           progress: Progress) -> dict[str, Any]:
    """Write weights and settings; returns what export_check.json says of them."""
    words = {spelled: word for word, spelled in DTYPE_WORDS.items()}
    stored = reader.manifest.entry("model.embed")
    assert stored is not None
    word = dtype or words[stored.dtype if origin is None else origin.dtype]
    exact = origin.dtypes if origin is not None and dtype is None else {}
    size = sum(torch.Size(reader.shape(name)).numel() for name in reader.names)
    preserved = reader.directory.parents[1] / PRESERVED
    kept = HuggingFaceFolder(preserved, {}) if origin is not None and preserved.is_dir() else None
    try:
        account = export_weights(
            reader, family, writer, dtype=DTYPES[DTYPE_WORDS[word]], dtypes=exact,
            spelling=origin and origin.spelling, preserved=kept,
            advance=progress(size * DTYPES[DTYPE_WORDS[word]].itemsize))
    finally:
        if kept is not None:
            kept.close()
    end_id = tokenizer.end_id if tokenizer is not None else None
    writer.write("config.json", _json(config_json(family, config, reader.vocab_size, word, end_id, origin)))
    if (generation := generation_json(config, end_id, origin)) is not None:
        writer.write(GENERATION, _json(generation))
    files = tokenizer_files(tokenizer, origin and origin.folder)
    for name, content in files.items():
        writer.write(name, content)
    return {
        "moetrain": __version__, "family": family.model_type, "architecture": family.architecture,
        "source": {"digest": reader.digest, "step": reader.manifest.values["step"]}, "dtype": word,
        "tokenizer": _described(tokenizer, files),
        "tensors": {"read": len(account.read), "written": len(account.written),
                    "preserved": len(account.preserved), "left_over": [],
                    "files": len(list(writer.folder.glob("*.safetensors"))), "bytes": writer.total_bytes},
        "versions": versions()}


def _compared(run: RecordedRun, reader: WeightsReader, family: Family, origin: Origin | None, folder: Path,
              tokenizer: Tokenizer | None, verify: bool) -> dict[str, Any]:
    reason = why_not(reader) if verify else "verify=false"
    if reason is not None:
        return {"not_compared": reason}
    tokens_BS, text = _batch(run, tokenizer, reader.vocab_size)
    spelling = origin and origin.spelling
    maps = [group for layer in family.tensor_maps(reader.config, reader.vocab_size, spelling)
            for group in layer]
    with open_folder(folder) as written:
        dtypes = {name: written.dtype(name) for name in written.names}
    return {"text": text, "version": versions()["transformers"],
            **compare_logits(reader, maps, folder, dtypes, tokens_BS)}


def _tokenizer(run: RecordedRun) -> Tokenizer | None:
    """The tokenizer of the run; None where its ids stand for no text, or it is nowhere to be found."""
    data = run.config.data
    if data.tokenizer == "none" or data.kind == "synthetic":
        return None
    if data.kind in ("text", "tokens"):
        return prepared_tokenizer(run)
    return getattr(open_trained(run), "tokenizer", None)


def _batch(run: RecordedRun, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[Tensor, str]:
    """Choose what is run through both models: held-out text of the run, else text that comes with Python."""
    length = min(run.config.train.seq_len, LENGTH)
    try:
        dataset = open_trained(run) if "data" in run.manifest.facts else None
    except DataError:
        dataset = None
    if dataset is not None:
        batch = dataset.batch(dataset.heldout_ids(0, SEQUENCES))
        length = min(length, int(batch.valid_BS.sum(1).min()))
        if length > 1:
            return batch.tokens_BS[:, :length], "held-out text of the run"
    if tokenizer is not None:
        documents = (document.text for document in builtin_documents(domain_cap=1 << 16))
        ids = torch.cat([torch.from_numpy(tokenizer.encode(text)) for text, _ in zip(documents, range(16))])
        if len(ids) >= SEQUENCES * length:
            return ids[:SEQUENCES * length].view(SEQUENCES, length), "text of the Python installation"
    drawn = torch.randint(vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    return drawn, "ids drawn at random: there is no text for them"


def parameter_counts(reader: WeightsReader) -> tuple[int, int]:
    """Count the parameters of a model, and those that a token uses.

    Args:
        reader: its weights.
    """
    sizes = reader.config.model
    per_bank: dict[str, list[int]] = {}
    dense = 0
    for name in reader.names:
        if not name.startswith("model."):
            continue
        numbers = torch.Size(reader.shape(name)).numel()
        bank, found, rest = name.partition(".experts.")
        if found:
            per_bank.setdefault(bank, []).append(numbers)
            per_bank.setdefault(f"{bank} experts", []).append(int(rest.partition(".")[0]))
        else:
            dense += numbers
    total = active = dense
    for bank in [bank for bank in per_bank if not bank.endswith(" experts")]:
        numbers, experts = sum(per_bank[bank]), len(set(per_bank[f"{bank} experts"]))
        layer = int(bank.split(".")[2]) if bank.split(".")[2].isdigit() else 0
        top_k = sizes.top_k if isinstance(sizes.top_k, int) else sizes.top_k[layer]
        total, active = total + numbers, active + numbers * top_k // experts
    return total, active


def _described(tokenizer: Tokenizer | None, files: dict[str, bytes]) -> str:
    if tokenizer is None and not files:
        return "none: the ids stand for no text"
    if tokenizer is None:
        return f"of the imported folder ({', '.join(files)})"
    kind = "bytes" if tokenizer.content is None else "tokenizer.json"
    return f"{kind}, {tokenizer.vocab_size:,} ids, {tokenizer.end_id} ends a document"


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=2) + "\n"
