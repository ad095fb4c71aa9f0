"""The built-in corpus: text that comes with every installation, so that a first run downloads nothing.

    python    the standard library       docs       docstrings of the packages below
    cpp       torch's C++ headers        notices    licences, read-me files, package descriptions
                                         stubs      *.pyi of the packages below

Lists of authors are left out: one file of names would be half of the held-out notices.

Only packages that moetrain itself requires are read, so whatever else is installed does not change the
corpus. Files come in the order of a hash of their relative name, up to DOMAIN_CAP bytes a domain, without
exact duplicates. Texts depend on the installed versions, so no figure about them is stored anywhere in the
code.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moetrain.errors import DataError

DOMAIN_CAP = 3_000_000
TRAIN_LIMIT = 100_000          # bytes of one document: generated files must not fill a domain
HELDOUT_LIMIT = 12_000         # of a held-out document: a single header once filled the whole held-out set
MIN_DOMAINS, MIN_BYTES, MIN_DOCUMENTS = 5, 500_000, 50
DISTRIBUTIONS = (
    "torch", "numpy", "hydra-core", "omegaconf", "antlr4-python3-runtime", "wandb", "safetensors",
    "tokenizers", "rich", "matplotlib", "pygments", "markdown-it-py", "sympy", "mpmath", "networkx", "jinja2",
    "fsspec", "filelock", "pillow", "fonttools", "contourpy", "kiwisolver", "pyparsing", "python-dateutil",
    "pydantic", "pydantic-core", "packaging", "platformdirs", "protobuf", "pyyaml", "requests", "urllib3",
    "click", "typing-extensions", "huggingface-hub",
)
_VERSION = 1                   # raise it when this file selects different texts
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_NOTICE = re.compile(r"^(METADATA|LICEN[CS]E|NOTICE|COPYING)|\.(md|rst)$", re.IGNORECASE)
_QUOTED = re.compile(rb'("""|\'\'\')(.*?)\1', re.DOTALL)


class CorpusDocument(NamedTuple):
    """One document of the built-in corpus.

    Args:
        domain: its domain.
        name: path of its file, relative to the package or the standard library.
        text: UTF-8.
    """

    domain: str
    name: str
    text: bytes


Extract = Callable[[bytes], bytes]


def identity() -> str:
    """A string that changes whenever the corpus may: versions of Python and of every package that is read."""
    versions = [f"{name}={_version(name)}" for name in DISTRIBUTIONS]
    return " ".join([f"corpus-{_VERSION}", f"python={platform.python_version()}", *versions])


def builtin_documents(*, domain_cap: int | None = None) -> Iterator[CorpusDocument]:
    """Yield the documents, domain by domain, up to `domain_cap` bytes (at most DOMAIN_CAP) a domain."""
    packaged = [file for name in DISTRIBUTIONS for file in _files_of(name)]
    groups: dict[str, tuple[list[tuple[str, Path]], Extract]] = {
        "cpp": (_headers(), bytes),
        "docs": ([file for file in packaged if file[0].endswith(".py")], _docstrings),
        "notices": ([file for file in packaged if _NOTICE.search(os.path.basename(file[0]))], bytes),
        "python": (_standard_library(), bytes),
        "stubs": ([file for file in packaged if file[0].endswith(".pyi")], bytes),
    }
    seen: set[bytes] = set()
    corpus = {domain: _collect(domain, files, extract, seen) for domain, (files, extract) in groups.items()}
    _check(corpus)
    for documents in corpus.values():
        yield from _up_to(documents, min(domain_cap or DOMAIN_CAP, DOMAIN_CAP))


def _collect(domain: str, files: list[tuple[str, Path]], extract: Extract,
             seen: set[bytes]) -> list[CorpusDocument]:
    """Unique texts of one domain, up to DOMAIN_CAP bytes. `seen` holds digests of all domains."""
    documents: list[CorpusDocument] = []
    size = 0
    for name, path in sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest()):
        text = _read(path, extract)
        digest = hashlib.sha256(text).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        documents.append(CorpusDocument(domain, name, text))
        size += len(text)
        if size >= DOMAIN_CAP:
            break
    return documents


def _up_to(documents: list[CorpusDocument], cap: int) -> Iterator[CorpusDocument]:
    for document in documents:
        if cap <= 0:
            return
        yield document._replace(text=_whole_characters(document.text[:cap]))
        cap -= len(document.text)


def _read(path: Path, extract: Extract) -> bytes:
    """Text of a file, cut to TRAIN_LIMIT; empty if it is not UTF-8 or cannot be read."""
    try:
        raw = path.read_bytes()
        raw.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if b"\0" in raw else _whole_characters(extract(raw)[:TRAIN_LIMIT])


def _whole_characters(text: bytes) -> bytes:
    return text.decode("utf-8", "ignore").encode()


def _docstrings(source: bytes) -> bytes:
    """Prose between triple quotes.

    Every pair of quotes is matched before filtering, so that no code between two strings slips in.
    """
    texts = (match.group(2) for match in _QUOTED.finditer(source))
    return b"\n\n".join(text for text in texts if len(text) > 80 and 12 * text.count(b" ") >= len(text))


def _standard_library() -> list[tuple[str, Path]]:
    return _walk(Path(sysconfig.get_path("stdlib")), (".py",), _STDLIB_SKIP)


def _headers() -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec("torch")               # finds torch without importing it
    folders = list(spec.submodule_search_locations or []) if spec else []
    return _walk(Path(folders[0]) / "include", (".h", ".hpp", ".cuh"), {"ops"}) if folders else []


def _walk(root: Path, suffixes: tuple[str, ...], skip: set[str]) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        paths = (Path(folder, name) for name in names if name.endswith(suffixes))
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return found


def _files_of(distribution: str) -> list[tuple[str, Path]]:
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [(str(file), Path(file.locate())) for file in files if _wanted(str(file))]


def _wanted(name: str) -> bool:
    return name.endswith((".py", ".pyi")) or bool(_NOTICE.search(os.path.basename(name)))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _check(corpus: dict[str, list[CorpusDocument]]) -> None:
    """DataError if too few domains have enough text."""
    sizes = {domain: sum(len(document.text) for document in documents)
             for domain, documents in corpus.items()}
    good = [domain for domain in corpus
            if sizes[domain] >= MIN_BYTES and len(corpus[domain]) >= MIN_DOCUMENTS]
    if len(good) < MIN_DOMAINS:
        found = ", ".join(f"{domain} {sizes[domain]:,} bytes in {len(corpus[domain])} files"
                          for domain in corpus)
        raise DataError(40, "the built-in corpus is too small here", where="data.path=null",
                        why=f"{MIN_DOMAINS} domains need {MIN_BYTES:,} bytes and {MIN_DOCUMENTS} files each; "
                            f"found {found}",
                        next="give text of your own: data.path=<file or folder>")
