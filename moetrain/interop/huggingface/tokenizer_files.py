"""Files of a public folder by which stock `AutoTokenizer` reads text as a run does.

    tokenizer.json          bytes: BPE without merges over the 256 byte-level characters, each with the id of
                            its byte; other tokenizers: the run's own file, which adds nothing to a text
    tokenizer_config.json   the end token; special strings inside a text stay text unless data.parse_special
    special_tokens_map.json the end token, for older readers

A run whose tokenizer is still the one of the folder that it was imported from has those files written back.

Byte-level characters are GPT-2's (Radford et al. 2019, byte-level BPE): printable bytes of Latin-1 stand for
themselves, the other 68 for the characters from U+0100 on, in the order of their bytes.
"""

import json
from pathlib import Path
from typing import Any

from moetrain.data.tokenizers.special_strings import without_processing
from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.files import read_bytes

END = "<|endoftext|>"
LARGEST_FILE = 1 << 30             # bytes, of a tokenizer's file or a picture
# What a tokenizer consists of in public folders, in any format.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json", "spiece.model",
                   "chat_template.jinja", "chat_template.json")


def tokenizer_files(tokenizer: Tokenizer | None, origin: Path | None = None) -> dict[str, bytes]:
    """Return the content of the tokenizer's files, by name; none for ids that stand for no text.

    Args:
        tokenizer: that of the run.
        origin: folder of what the run keeps of the folder that it was imported from (runs/origin.py).
    """
    kept = {name: read_bytes(origin / name, limit=LARGEST_FILE) for name in TOKENIZER_FILES
            if origin is not None and (origin / name).is_file()}
    if tokenizer is None or kept and kept.get("tokenizer.json") == tokenizer.content:
        return kept
    if tokenizer.content is None:
        tree, end = byte_tokenizer(tokenizer.end_id), END
    else:
        tree = without_processing(tokenizer.content)
        end = _end_token(tree, tokenizer.end_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
                "clean_up_tokenization_spaces": False, "split_special_tokens": not tokenizer.parse_special}
    return {"tokenizer.json": _json(tree), "tokenizer_config.json": _json(settings),
            "special_tokens_map.json": _json({"eos_token": end})}


def byte_tokenizer(end_id: int) -> dict[str, Any]:
    """Return the tokenizer.json of the byte vocabulary.

    Args:
        end_id: id of the token that ends a document.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [_added(END, end_id)],
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "merges": [],
                      "vocab": {character: byte for byte, character in enumerate(byte_characters())}}}


def byte_characters() -> list[str]:
    """List the byte-level character of each byte."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def _end_token(tree: dict[str, Any], end_id: int) -> str:
    """Find the token of an id; one that the tokenizer has not is added, by a name that it has not."""
    vocabulary = tree["model"]["vocab"]
    named = dict(vocabulary) if isinstance(vocabulary, dict) else {
        token: place for place, (token, *_) in enumerate(vocabulary)}
    named |= {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
    found = next((token for token, number in named.items() if number == end_id), None)
    if found is None:
        found = END
        while found in named:
            found = f"<{found}>"
        tree["added_tokens"] = [*(tree.get("added_tokens") or []), _added(found, end_id)]
    return found


def _added(content: str, number: int) -> dict[str, Any]:
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=2) + "\n").encode()
