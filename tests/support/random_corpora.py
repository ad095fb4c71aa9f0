"""Random corpora for hypothesis: trees of files of every kind, and what must become of each document."""

import importlib.util
import random
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from tests.support.corpus_files import (
    COMPRESS,
    ENDINGS,
    MARKS,
    NO_TEXT,
    SURROGATE,
    Keys,
    Record,
    SourceFile,
    expected,
    json_file,
    no_text,
    parquet_file,
    table_file,
)

SEPARATOR = "<|endoftext|>"
RECORDS = ("JSON", "JSON", "CSV", "TSV", *(("Parquet",) if importlib.util.find_spec("pyarrow") else ()))
ENCODINGS = ("utf-8",) * 4 + ("cp1252", "utf-16-le", "utf-32-be", "shift_jis", "gb18030", "koi8-r")
# Also what other readers take for the end of a line, of a cell, of an object, or for a mark.
PIECES = ("word ", "and so on, ", "\u00fcber Stra\u00dfen ", "\u5b57\u5178", "\U0001f600", "\n", "\n\n",
          "\r\n", "\t", '"', "{", "}]", "\\n", ";", "  ", "\u2028", "\x85", "\x0b", "\x0c", "\r",
          "<|endoftext|> ", "'", "\ufeff", "\u0434\u0430 ", "e\u0301", "#!", "1,2;3\t4", "\x1b[0m",
          "\u00a0", "</s>")
# Text that begins like something else. None has a key of records.
LOOKS_LIKE = ('{"a": 1}\n', '{"name": "x",\n "values": [1]}\n', "[1, 2, 3]", '["text", "other"]',
              "{{ template }}\n", "BM is how a line begins\n", "PK, said the keeper\n", "ORC soldiers\n",
              "GIF89 was a format\n", "# a,b\n1,2\n", "a,b\n1,2\n3,4\n", "---\ntitle: x\n---\n",
              "<html><body>x</body></html>", '{"cells": [], "nbformat": 4}\n', "\n\n   text",
              '"a quote that never ends\n', "ID3 and RIFF\n",
              "one NUL \0 in a book " + "of many words " * 90, "text and more\nin two lines\n",
              "version 1 of https\n", "\n", " ", "7z", "%PDFs are\n", "a\tb\n1\t2\n", "1 2 3\n4 5 6\n",
              "SELECT text FROM t;\n", "IwA= 0\n")
# Name and the suffix that is a domain. Names of moetrain's own files, too, which anybody may have.
NAMES = (("a{}.txt", "txt"), ("b{}.md", "md"), ("README{}", "text"), ("x{}.py", "py"),
         ("corpus{}.00", "text"), ("corpus{}.01", "text"), ("c4-{}.00000-of-01024.json", "json"),
         ("a b {}.TXT", "TXT"), ("\u00fcber{}.rst", "rst"), ("config{}.yaml", "yaml"),
         ("metrics{}.txt", "txt"))
FOLDERS = ("", "", "", "py/", "py/deep/er/", "docs/", "a b/", "\u00fcb\u00e4r/x=y,z/", "runs/", "data/log/")
DOMAINS = ("web", "py", "a/b", "\u00fcber", "0", " spaces ", "x" * 120, "txt", None, None, "")
# A program called train.py and a page about tests are no split.
NO_SPLIT = ("md", "py", "rst", "yaml", "csv", "tsv")
VALID = ("valid", "validation", "val", "dev")


@dataclass(frozen=True)
class Corpus:
    """What lies on disk, and the keys that it is read with.

    Args:
        files: below data.path.
        held_out: below data.held_out; None where that is not given.
        inside: whether data.held_out lies below data.path.
        keys: overrides of the command line.
        shared: whether a share of the text is held out, so that the hash of a document tells its side.
        cap: data.domain_cap.
        counts_empty: whether the number of empty texts is beyond doubt.
    """

    files: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...] | None
    inside: bool
    keys: tuple[str, ...]
    shared: bool
    cap: int | None
    counts_empty: bool


@dataclass(frozen=True)
class Way:
    """How the files of a corpus are written and read."""

    keys: Keys
    encoding: str
    separator: str | None
    chance: random.Random


def texts(encoding: str, surrogates: bool = False) -> st.SearchStrategy[str]:
    """Text that the encoding has characters for."""
    pieces = [piece for piece in PIECES if _fits(piece, encoding)]
    return st.lists(st.sampled_from([*pieces, SURROGATE] if surrogates else pieces), max_size=8).map("".join)


def _fits(piece: str, encoding: str) -> bool:
    try:
        return piece.encode(encoding).decode(encoding) == piece
    except UnicodeError:
        return False


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """A corpus with a split of its own, with data.held_out, or with neither."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    text = draw(st.sampled_from(["text", "text", "text", "content", "meta.body", None]))
    domain = draw(st.sampled_from(["domain", "domain", "meta.set", None]))
    keys = Keys(text, domain, nested=draw(st.booleans()))
    way = Way(keys, draw(st.sampled_from(ENCODINGS)), draw(st.sampled_from([None, None, SEPARATOR])), chance)
    held = draw(st.sampled_from(["split", "split", "key", "share", "few"]))
    files = draw(st.lists(source_files(way), min_size=2, max_size=9))
    if text not in ("text", None):                   # a key that finds no record is refused
        files.append(draw(_record_files(way, "JSON")))
    split = draw(splits()) if held == "split" else None
    last = files[-1]
    files = [_placed(file, number, draw, split, "train" if file is last else None)
             for number, file in enumerate(files)]
    own: tuple[SourceFile, ...] | None = None
    if held == "split":
        own_files = [("train", "one"), ("valid", "two"), ("train", "three")]
        files += [_placed(_plain(f"{side} text {word}", way), 90 + number, draw, split, side)
                  for number, (side, word) in enumerate(own_files)]
    elif held == "key":
        kept = draw(st.lists(source_files(way), max_size=3))
        own = (*(_placed(file, number, draw, None) for number, file in enumerate(kept)),
               _placed(_plain("held-out text", way), 99, draw, None))
        files.append(_placed(_plain("text to train on", way), 99, draw, None))
    else:
        size, number = (12, 30) if held == "share" else (4000, 1)
        words = "of many words " * (size // 12)
        files += [_plain(f"filler {place} {words}", way, f"filler/{place}.txt") for place in range(number)]
    files += [file for file in draw(st.lists(left_out(), max_size=3))
              if way.encoding == "utf-8" or file.reason != "not text"]
    overrides = [f"data.text_key={text or 'null'}", f"data.domain_key={domain or 'null'}",
                 f"data.encoding={way.encoding}"]
    if way.separator is not None:
        overrides.append(f"data.separator={way.separator}")
    cap = draw(st.sampled_from([None, None, 60, 900])) if held in ("split", "key") else None
    if cap is not None:
        overrides.append(f"data.domain_cap={cap}")
    unique = {file.path: file for file in files}
    return Corpus(tuple(unique.values()), own, inside=draw(st.booleans()), keys=tuple(overrides),
                  shared=held in ("share", "few"), cap=cap, counts_empty=way.separator is None)


@st.composite
def source_files(draw: st.DrawFn, way: Way) -> SourceFile:
    """A file that is read, at no place yet: `path` is its name, with {} where a number goes."""
    kind = draw(st.sampled_from(["text", "text", "like", "undecodable", "nothing", *RECORDS]))
    if way.keys.text is None and kind in RECORDS:
        kind = "text"
    if kind == "undecodable" and way.encoding != "utf-8":
        kind = "like"
    if kind in ("text", "like", "undecodable", "nothing"):
        made = draw(_text_files(way, kind))
    else:
        made = draw(_record_files(way, kind))
    compression = draw(st.sampled_from(["", "", *COMPRESS]))
    ending = draw(st.sampled_from([ENDINGS[compression]] * 2 + [".gz", ""]))
    assert made.content is not None
    if kind == "nothing" and not compression and not made.content:
        compression = "gzip"                                         # a file without a byte is left out
    return replace(made, content=COMPRESS[compression](made.content), compression=compression,
                   path=made.path + ending)


@st.composite
def _text_files(draw: st.DrawFn, way: Way, kind: str) -> SourceFile:
    name, suffix = draw(st.sampled_from(NAMES))
    encoding, mark = draw(_marked(way.encoding))
    if kind == "nothing":
        return SourceFile(name, mark, format="text", suffix=suffix, empty=1)
    if kind == "like":
        (text,) = parts = [draw(st.sampled_from(LOOKS_LIKE))]
    else:
        number_of = draw(st.integers(1, 4 if way.separator else 1))
        parts = [f"t{number} " + draw(texts(encoding)) for number in range(number_of)]
        line = draw(st.sampled_from(["\n", "\r\n"])) if way.separator else ""
        parts = [part + "\n" for part in parts[:-1]] + parts[-1:]
        text = f"{way.separator}{line}".join(parts)
    content, documents = text.encode(encoding), [part.encode() for part in parts]
    bad = 0
    if kind == "undecodable" and mark == b"" and encoding == "utf-8":
        bad, extra = 1, b"\nlong line\n" + b"plain words " * 9 + b"\xff" + b" and words\n" * 9
        content, documents[-1] = content + extra, documents[-1] + extra
    return SourceFile(name, mark + content, format="text", suffix=suffix, undecodable=bad,
                      documents=tuple((None, document) for document in documents))


@st.composite
def _record_files(draw: st.DrawFn, way: Way, kind: str) -> SourceFile:
    name, suffix = draw(st.sampled_from(NAMES))
    delimiter = {"CSV": ",", "TSV": "\t"}.get(kind, "")
    if delimiter and draw(st.booleans()):
        name, suffix = f"t{{}}.{kind.lower()}", kind.lower()
        delimiter = draw(st.sampled_from([",", ";"])) if kind == "CSV" else delimiter
    encoding, mark = draw(_marked(way.encoding)) if kind != "Parquet" else ("utf-8", b"")
    some = st.one_of(st.none(), texts("utf-8" if kind == "JSON" else encoding, surrogates=kind == "JSON"))
    domains = [one for one in DOMAINS if one is None or _fits(one, encoding)]
    rows = st.builds(Record, some, st.sampled_from(domains))
    records = [Record("a first text", "web"), *draw(st.lists(rows, max_size=6))]
    match kind:
        case "JSON":
            text, ascii_only = json_file(records, way.keys, way.chance)
            fits = _fits(text, encoding)
            content = mark + text.encode(encoding) if fits else json_ascii(records, way, mark, encoding)
        case "Parquet":
            content = parquet_file(records, way.keys, way.chance)
        case _:
            content = mark + table_file(records, way.keys, delimiter, way.chance).encode(encoding)
    documents, empty, undecodable = expected(records, way.keys)
    return SourceFile(name, content, format=kind, suffix=suffix, documents=documents, empty=empty,
                      undecodable=undecodable)


def json_ascii(records: list[Record], way: Way, mark: bytes, encoding: str) -> bytes:
    """JSON with escapes, for an encoding that does not have all the characters."""
    while True:
        text, ascii_only = json_file(records, way.keys, way.chance)
        if ascii_only:
            return mark + text.encode(encoding)


@st.composite
def _marked(draw: st.DrawFn, encoding: str) -> tuple[str, bytes]:
    """The encoding of a file and its byte order mark: another one than data.encoding needs a mark."""
    if draw(st.integers(0, 3)):
        return encoding, b""
    marked = draw(st.sampled_from(sorted(MARKS)))
    return marked, MARKS[marked]


def _plain(text: str, way: Way, path: str = "") -> SourceFile:
    """A text file that has its place, or none yet."""
    return SourceFile(path or "p{}.txt", text.encode(way.encoding), format="text", suffix="txt",
                      documents=((path.partition("/")[0] or None, text.encode()),))


@dataclass(frozen=True)
class Split:
    """A split that lies in the tree: by folders or by names, at one level, with its words for the sides."""

    shape: str
    level: str
    words: dict[str, str]


@st.composite
def splits(draw: st.DrawFn) -> Split:
    shape = draw(st.sampled_from(["folders", "parts", "words", "prefixes"]))
    level = draw(st.sampled_from(["", "", "top/", "top/deep/"]))
    return Split(shape, level, {"train": "train", "valid": draw(st.sampled_from(VALID)), "test": "test"})


def _placed(file: SourceFile, number: int, draw: st.DrawFn, split: Split | None,
            side: str | None = None) -> SourceFile:
    """The file somewhere in the tree. Domains of documents that name none follow from it."""
    folder = draw(st.sampled_from(FOLDERS))
    side = side or (draw(st.sampled_from(["train", "train", "valid", "test", ""])) if split else "")
    if split is not None and split.shape != "folders" and file.suffix in NO_SPLIT:
        side = ""                                    # beside a split of names, and none of it
    if split is None or not side:
        split, top = None, folder
    else:
        top = split.level + (folder if split.shape == "folders" else "")
    moved = folder and folder + "moved/"
    places = [_place(file.path, place, folder if place == number else moved, split, side)
              for place in (number, 1000 - number)]
    domain = top.partition("/")[0] or file.suffix
    documents = tuple((own or domain, text) for own, text in file.documents)
    return replace(file, path=places[0], elsewhere=places[1], side=side or "train", suffix="",
                   reason="test split" if side == "test" else "", documents=documents)


def _place(pattern: str, number: int, folder: str, split: Split | None, side: str) -> str:
    """Where a file lies: in a folder, or at the place that its split gives it."""
    name = pattern.format(number)
    if split is None:
        return folder + name
    word, rest = split.words[side], name.partition(".")[2]
    rest = f".{rest}" if rest else ""
    match split.shape:
        case "folders":
            return f"{split.level}{word}/{folder}{name}"
        case "parts":                                # ptb.train.txt: what stands before the word is the same
            return f"{split.level}ptb.{word}.{number}{rest}"
        case "words":
            return f"{split.level}wiki-{word}-{number:05}-of-00099{rest}"
        case _:
            return f"{split.level}{word}-{name}"


@st.composite
def left_out(draw: st.DrawFn) -> SourceFile:
    """What is in a folder and no text to train on."""
    kind = draw(st.sampled_from(["hidden", "hidden folder", "empty", "log", "nowhere", *NO_TEXT]))
    match kind:
        case "hidden":
            return SourceFile("docs/.hidden.txt", b"hidden text", reason="hidden")
        case "hidden folder":
            return SourceFile(".git/objects/a.txt", b"hidden text in a folder", reason="hidden")
        case "empty":
            return SourceFile("py/empty.txt", b"", reason="empty")
        case "log":
            return SourceFile("moetrain-7.log", b"what a launcher said", reason="own output")
        case "nowhere":
            return SourceFile("docs/nowhere.txt", None, reason="no file")
        case _:
            return SourceFile(f"docs/data.{kind}", no_text(kind), reason="not text")
