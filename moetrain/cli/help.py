"""Pages of `--help`, 80 columns wide: the docstring of a verb, and for `train` groups and keys. No torch.

    moetrain train --help            what it does, the keys to know first, the groups
    moetrain train --help optim      the options of a group and the keys of its section
    moetrain train --help optim.lr   a key; overrides beside --help are ignored
    moetrain train --help all        every page
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Literal, get_args, get_origin

from moetrain.config import readers
from moetrain.config.build import SIZES, NoSuchPart, arguments
from moetrain.config.groups import (
    broken_files,
    config_dir,
    group_of,
    group_options,
    option_file,
    section_of,
)
from moetrain.config.renamed import new_path
from moetrain.config.rules.ranges import RANGES
from moetrain.config.suggest import nearest
from moetrain.config.values import Key, schema_keys, schema_sections, show, type_name
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError
from moetrain.packages import option_folders

WIDTH = 80
# The keys to know first; all others are on the page of their section.
FIRST_KEYS = (
    "run.name", "run.dir", "run.nproc", "run.steps", "run.stop_at", "run.seed", "run.device", "run.dtype",
    "train.global_batch", "train.micro_batch", "train.seq_len", "optim.lr", "data.path", "parallel.ep",
    "checkpoint.interval", "eval.interval",
)


def page(verb: str, doc: str, words: Sequence[str]) -> str:
    """Write what `moetrain <verb> --help <words>` prints."""
    if verb != "train":
        return refilled(doc)
    asked = min(words.index(flag) for flag in ("-h", "--help") if flag in words)
    known = {*pages(), *group_options(), "all"}  # another word before --help may be a run
    names = [word for place, word in enumerate(words)
             if word[:1] != "-" and "=" not in word and (place > asked or word in known)]
    if not names:
        return "\n".join([refilled(doc), *overview()])
    if names == ["all"]:
        return "\n\n".join(section_page(name) for name in pages())
    return "\n\n".join(section_page(name) for name in names)


def pages() -> list[str]:
    """List the pages of `train`: sections, and groups without a section."""
    sections = list(schema_sections())
    return sections + [group for group in group_options() if section_of(group) not in sections]


def overview() -> Iterator[str]:
    """Yield the keys to know first, the groups, and where the rest is."""
    yield "\nKeys to know first"
    yield from first_keys()
    yield "\nGroups: <group>=<option>"
    for group, options in group_options().items():
        yield _hanging(f"  {group:12s} ", " ".join(options))
    yield "\nPages of options and keys: moetrain train --help <page>"
    yield _hanging("  ", " ".join([*pages(), "all"]))


def first_keys() -> Iterator[str]:
    """Yield a line for each of the keys to know first."""
    keys = schema_keys()
    for path in FIRST_KEYS:
        yield _hanging(f"  {path:20s} ", keys[path].help)


def section_page(name: str) -> str:
    """Write the options of a group and the keys of its section, or one key.

    Files of the group that cannot be read are listed with their error.
    """
    for key in keys_of(section_of(name.partition(".")[0])) if "." in name else ():
        if key.path == name:
            return "\n".join(described(key))
    if name not in {*pages(), *group_options()}:
        old = [new_path(name)] if new_path(name) != name else []
        near = old or nearest(name, [*pages(), *group_options(), *schema_keys()])
        raise ConfigError(
            106, f"there is no page {name}", where="the command line",
            why=f"the pages are {', '.join(pages())}",
            next=" or ".join(f"moetrain train --help {page}" for page in near) or "moetrain train --help")
    section = section_of(name)
    group, lines = group_of(section), []
    if options := group_options().get(group, []):
        lines += [f"{group}=<option>"]
        for option in options:
            chosen = f"loss=[{option}]" if group == "loss" else f"{group}={option}"
            lines += [f"  {chosen}", *_indented(comment(option_file(group, option)))]
        for error in broken_files(*(folder / group for folder in (config_dir(), *option_folders()))):
            lines += ["", _hanging("  ! ", f"{error.where}: {error.what}; {error.why}")]
    if keys := keys_of(section):
        lines += ["", f"{section}.<key>"] if lines else [f"{section}.<key>"]
        for key in keys:
            lines += described(key)
    return "\n".join(lines)


def described(key: Key) -> list[str]:
    """Write a key with its default, what it does, and what it takes."""
    first = _hanging("  ", f"{key.path}={show(key.default)}")
    return [first, *_indented(key.help), *_indented(f"[{details(key)}]")]


def details(key: Key) -> str:
    """Write the type and bounds of a key, and the options that read it."""
    bounds = key.bounds or next((text for text, paths in RANGES.items() if key.path in paths), "")
    needed = [readers.in_words(condition) for condition in readers.conditions(key.path)]
    text = ", ".join([type_name(key.type).replace("|", " | "), *([bounds] if bounds else [])])
    return text + (f"; read with {' and '.join(needed)}" if needed else "")


def keys_of(section: str) -> list[Key]:
    """List the keys of a section: those of the schema, or the arguments of every part of the group."""
    if schema_sections().get(section) is not dict:
        return [key for path, key in schema_keys().items() if path.startswith(f"{section}.")]
    keys: dict[str, Key] = {}
    for option in group_options()[section]:
        file = option_file(section, option)
        for key in _option_keys(section, option, file.read_text(encoding="utf-8"), file):
            keys[key.path] = _either(keys[key.path], key) if key.path in keys else key
    return list(keys.values())


def comment(file: Path) -> str:
    """Read the comment at the head of a yaml file."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            words.append(line.lstrip("# ").strip())
    return " ".join(words)


def refilled(doc: str) -> str:
    """Fill the paragraphs of a docstring at 80 columns; the columns of indented lines stay."""
    lines = []
    for paragraph in doc.strip().split("\n\n"):
        indented = any(line.startswith(" ") for line in paragraph.splitlines())
        for line in paragraph.splitlines() if indented else [" ".join(paragraph.split())]:
            head = re.match(r"( +\S.*?  +)(?=\S)", line) or re.match(r" *", line)
            assert head is not None                       # the second pattern matches the empty text, too
            lines.append(_hanging(head[0], line[len(head[0]):]))
        lines.append("")
    return "\n".join(lines[:-1])


def _option_keys(section: str, option: str, text: str, file: Path) -> Iterator[Key]:
    """Read the arguments behind an option from the text of its file, so that a broken file has a page too."""
    comments = dict(re.findall(r"^\s*(\w+):[^#\n]*#\s*(.+)$", text, re.MULTILINE))
    prefix = f"loss.{option}" if section == "loss" else section
    for target in re.findall(r"_target_:\s*([\w.]+)", text):
        try:
            accepted = arguments(target, section)
        except NoSuchPart:
            continue
        # Losses add up, so the values in the file are the defaults of the keys.
        written = _written(file, option) if section == "loss" else {}
        for name, key in accepted.items():
            if name not in SIZES:
                help = comments.get(name, f"argument of {target.rpartition('.')[2]}")
                yield key._replace(path=f"{prefix}.{name}", help=help, default=written.get(name, key.default))


def _written(file: Path, option: str) -> dict[str, object]:
    try:
        node = load(file).get(option)
    except ConfigError:  # broken_files reports it
        return {}
    return node if isinstance(node, dict) else {}


def _either(first: Key, other: Key) -> Key:
    """Merge an argument that two classes of a group have: the choices of both."""
    choices = dict.fromkeys([*get_args(first.type), *get_args(other.type)])
    both = get_origin(first.type) is get_origin(other.type) is Literal
    return first._replace(type=Literal[tuple(choices)]) if both else first


def _hanging(head: str, text: str) -> str:
    """Wrap text after a head, below its own beginning."""
    indent = " " * min(len(head), 28)
    return "\n".join(wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False,
                          break_long_words=False)) or head.rstrip()


def _indented(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False,
                break_long_words=False)
