"""Commands of README and docs/: found in the text, and cut down so that a test can run each in a second.

    commands(page)      the lines of its ```bash blocks, and commands with arguments in its tables
    cut(verb, words)    the same command for one process, a tiny model, a few tokens, one step

A command is cut by replacing values, never by leaving out a key that it sets, but for the sizes of a mesh.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
STARTS = ("moetrain", "bash", "python", "torchrun", "sbatch", "pip", "source")
SMALL = {
    "train": {"run.steps": "1", "train.global_batch": "2", "train.micro_batch": "2", "train.seq_len": "32",
              "eval.windows": "1", "log.wandb": "off", "run.device": "cpu", "model": "debug"},
    "eval": {"eval.windows": "1"},
    "generate": {"generate.tokens": "2"},
}
MESH = ("run.nproc", "parallel.ep", "parallel.shard")        # one process has no use for them
FLAGS = {"slurm": ["--dry-run"]}


class Command(NamedTuple):
    """A command of a page.

    Args:
        text: as it stands on the page.
        words: as the shell hands them over, without a here-document.
        settings: NAME=value in front of the command.
    """

    text: str
    words: list[str]
    settings: dict[str, str]


def commands(page: Path) -> list[Command]:
    return [_read(text) for text in _lines(page.read_text(encoding="utf-8"))]


def _lines(text: str) -> Iterator[str]:
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        whole = re.compile(r"^.*<<'(\w+)'\n(?:.*\n)*?\1$|^.+$", re.MULTILINE)
        found = (match[0] for match in whole.finditer(block.replace("\\\n", " ")))
        yield from (line for line in found if not line.startswith("#"))
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", row):
            first = code.split()[0]
            typed = first in STARTS and len(code.split()) > 2 or re.match(r"[A-Z]+=\S+ ", code)
            if typed and not re.search(r"[<…]|\.\.\.", code):
                yield code


def _read(text: str) -> Command:
    words = shlex.split(text.partition("\n")[0], comments=True)
    settings: dict[str, str] = {}
    while len(words) > 1 and re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    return Command(text if "\n" in text else text.partition("  #")[0].strip(), words, settings)


def cut(verb: str, words: list[str]) -> list[str]:
    """Make a verb's words small: keys of SMALL get its values, whether they were typed or not."""
    small = dict(SMALL.get(verb, {}))
    if verb == "train" and "experiment=debug" in words:
        del small["model"]                               # it is as small, and without text
    elif verb in ("train", "data") and not any(word.startswith(("data=", "data.path=")) for word in words):
        small |= {"data.path": "text", "data.cache": "tokens"}
    lost = (*small, *MESH) if verb == "train" else (*small,)
    kept = [word for word in words if key(word) not in lost and word not in FLAGS.get(verb, [])]
    return [*kept, *(f"{name}={value}" for name, value in small.items()), *FLAGS.get(verb, [])]


def key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
