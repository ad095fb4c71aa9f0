"""Pages of `--help`, 80 columns wide: a verb's docstring, and for `train` the groups and keys. Imports no torch.

    moetrain train --help          what it does, the keys to know first, the groups
    moetrain train --help optim    the options of a group and the keys of its section
    moetrain train --help optim.lr a key; overrides beside --help are left aside
    moetrain train --help all      every page
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Literal, get_args, get_origin

from moetrain.config import readers
from moetrain.config.build import SIZES, NoSuchPart, arguments
from moetrain.config.groups import broken_files, config_dir, group_of, group_options, section_of
from moetrain.config.rules.ranges import RANGES
from moetrain.config.suggest import nearest
from moetrain.config.values import Key, schema_keys, schema_sections, show, type_name
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError

WIDTH = 80
# The keys to know first; every other is on the page of its section.
FIRST_KEYS = (
    "run.name", "run.dir", "run.nproc", "run.steps", "run.stop_at", "run.seed", "run.device", "run.dtype",
    "train.global_batch", "train.micro_batch", "train.seq_len", "optim.lr", "data.path", "parallel.ep",
    "checkpoint.interval", "eval.interval",
)


def page(verb: str, doc: str, words: Sequence[str]) -> str:
    """What `moetrain <verb> --help <words>` prints."""
    if verb != "train":
        return refilled(doc)
    asked = min(words.index(flag) for flag in ("-h", "--help") if flag in words)
    known = {*pages(), *group_options(), "all"}              # a word before --help may be a run
    names = [word for place, word in enumerate(words) if word[:1] != "-" and "=" not in word and (place > asked or word in known)]
    if not names:
        return "\n".join([refilled(doc), *overview()])
    if names == ["all"]:
        return "\n\n".join(section_page(name) for name in pages())
    return "\n\n".join(section_page(name) for name in names)


def pages() -> list[str]:
    """The names of the pages of `train`: sections, and groups that have none."""
    sections = list(schema_sections())
    return sections + [group for group in group_options() if section_of(group) not in sections]


def overview() -> Iterator[str]:
    """The keys to know first, the groups, and where the rest is."""
    yield "\nKeys to know first"
    yield from first_keys()
    yield "\nGroups: <group>=<option>"
    for group, options in group_options().items():
        yield _hanging(f"  {group:12s} ", " ".join(options))
    yield "\nPages of options and keys: moetrain train --help <page>"
    yield _hanging("  ", " ".join([*pages(), "all"]))


def first_keys() -> Iterator[str]:
    keys = schema_keys()
    for path in FIRST_KEYS:
        yield _hanging(f"  {path:20s} ", keys[path].help)


def section_page(name: str) -> str:
    """Options of the group and keys of the section, or one key; files of the group that cannot be read, by line."""
    if key := next((key for key in keys_of(section_of(name.partition(".")[0])) if key.path == name), None) if "." in name else None:
        return "\n".join(described(key))
    if name not in {*pages(), *group_options()}:
        near = nearest(name, [*pages(), *group_options(), *schema_keys()])
        raise ConfigError(106, f"there is no page {name}", where="the command line", why=f"the pages are {', '.join(pages())}",
                          next=" or ".join(f"moetrain train --help {page}" for page in near) or "moetrain train --help")
    section = section_of(name)
    group, folder = group_of(section), config_dir() / group_of(section)
    lines = []
    if options := group_options().get(group, []):
        lines += [f"{group}=<option>"]
        for option in options:
            chosen = f"loss=[{option}]" if group == "loss" else f"{group}={option}"
            lines += [f"  {chosen}", *_indented(comment(folder / f"{option}.yaml"))]
        for error in broken_files(folder):
            lines += ["", _hanging("  ! ", f"{error.where}: {error.what}; {error.why}")]
    if keys := keys_of(section):
        lines += ["", f"{section}.<key>"] if lines else [f"{section}.<key>"]
        for key in keys:
            lines += described(key)
    return "\n".join(lines)


def described(key: Key) -> list[str]:
    """A key with its default, what it does, and what it takes."""
    return [_hanging("  ", f"{key.path}={show(key.default)}"), *_indented(key.help), *_indented(f"[{details(key)}]")]


def details(key: Key) -> str:
    """Type, bounds, and what a key is read with."""
    bounds = key.bounds or next((text for text, paths in RANGES.items() if key.path in paths), "")
    needed = [readers.in_words(condition) for condition in readers.conditions(key.path)]
    text = ", ".join([type_name(key.type).replace("|", " | "), *([bounds] if bounds else [])])
    return text + (f"; read with {' and '.join(needed)}" if needed else "")


def keys_of(section: str) -> list[Key]:
    """The keys of a section: of the schema, or the arguments of every part that an option of the group names."""
    if schema_sections().get(section) is not dict:
        return [key for path, key in schema_keys().items() if path.startswith(f"{section}.")]
    keys: dict[str, Key] = {}
    for option in group_options()[section]:
        file = config_dir() / section / f"{option}.yaml"
        for key in _option_keys(section, option, file.read_text(encoding="utf-8"), file):
            keys[key.path] = _either(keys[key.path], key) if key.path in keys else key
    return list(keys.values())


def comment(file: Path) -> str:
    """The comment at the head of a yaml file."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            words.append(line.lstrip("# ").strip())
    return " ".join(words)


def refilled(doc: str) -> str:
    """A docstring at 80 columns: paragraphs filled, columns of indented lines kept."""
    lines = []
    for paragraph in doc.strip().split("\n\n"):
        indented = any(line.startswith(" ") for line in paragraph.splitlines())
        for line in paragraph.splitlines() if indented else [" ".join(paragraph.split())]:
            head = re.match(r"( +\S.*?  +)(?=\S)", line) or re.match(r" *", line)
            lines.append(_hanging(head[0], line[len(head[0]):]))
        lines.append("")
    return "\n".join(lines[:-1])


def _option_keys(section: str, option: str, text: str, file: Path) -> Iterator[Key]:
    """Arguments of the class that an option names, read from its text, so that a broken file still has a page."""
    comments = dict(re.findall(r"^\s*(\w+):[^#\n]*#\s*(.+)$", text, re.MULTILINE))
    prefix = f"loss.{option}" if section == "loss" else section
    for target in re.findall(r"_target_:\s*([\w.]+)", text):
        try:
            accepted = arguments(target, section)
        except NoSuchPart:
            continue
        written = _written(file, option) if section == "loss" else {}      # an option a section: its values are the defaults
        for name, key in accepted.items():
            if name not in SIZES:
                help = comments.get(name, f"argument of {target.rpartition('.')[2]}")
                yield key._replace(path=f"{prefix}.{name}", help=help, default=written.get(name, key.default))


def _written(file: Path, option: str) -> dict[str, object]:
    try:
        node = load(file).get(option)
    except ConfigError:                                      # broken_files says it
        return {}
    return node if isinstance(node, dict) else {}


def _either(first: Key, other: Key) -> Key:
    """One argument that two classes of a group have: the choices of both."""
    choices = dict.fromkeys([*get_args(first.type), *get_args(other.type)])
    both = get_origin(first.type) is get_origin(other.type) is Literal
    return first._replace(type=Literal[tuple(choices)]) if both else first


def _hanging(head: str, text: str) -> str:
    """Text behind a head, wrapped below its own beginning."""
    indent = " " * min(len(head), 28)
    return "\n".join(wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False,
                          break_long_words=False)) or head.rstrip()


def _indented(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False, break_long_words=False)
