"""Words that docs/reference/output.md defines, and those of a banner or a step line that it does not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "output.md").read_text(encoding="utf-8")
# Not the unit of a figure (412k, 3h06, 2.9e-4), nor a path.
_WORD = r"(?<![\w.,/])[A-Za-z_]\w*+(?:/s\b)?(?!/)"


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head."""
    text = re.split(rf"^## {heading}$", PAGE, flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def defined(heading: str) -> set[str]:
    """Words in backticks in the first column."""
    return {word for row in table(heading) for quoted in re.findall(r"`([^`]+)`", row[0])
            for word in words(quoted)}


def words(text: str) -> list[str]:
    return re.findall(_WORD, text)


def labels(banner: str) -> list[str]:
    """Labels of the rows of a banner, without its first line."""
    return [line.split()[0] for line in banner.splitlines()[1:]]


def undefined_in_banner(banner: str, names: Iterable[Any] = ()) -> set[str]:
    """Words of a banner that the page does not explain; `names` are values of the config and the like."""
    explained = {row[0].strip("`"): set(words(" ".join(row))) for row in table("Banner")}
    own = {word for name in names for word in words(str(name))}
    first, *rows = banner.splitlines()
    found = set(words(first)) - explained["first line"] - own - {"moetrain"}
    for row in rows:
        label = row.split()[0]
        if label not in explained:
            found.add(label)
        else:
            known = explained[label] | own | _UNITS
            found |= {word for word in words(row)
                      if word not in known and word.lower() not in explained[label]}
    return found


def undefined_in_step_line(line: str, losses: Iterable[str] = ()) -> set[str]:
    """Words of a step line that the page does not define; `losses` are names of further losses."""
    return set(words(line)) - defined("Step line") - set(losses)


_UNITS = {"k", "M", "G", "T", "B", "kB", "MB", "GB", "TB"}


def sample(markdown: str) -> tuple[str, list[str]]:
    """The banner and the step lines that a page shows in its first block with output of `train`."""
    for block in re.findall(r"^```\w*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        first = next((number for number, line in enumerate(lines)
                      if re.match(r"moetrain \S+ \| run ", line)), None)
        if first is not None:
            rows = [line for line in lines[first + 1:]
                    if re.match(r"[a-z]+ {2,}\S", line) and not line.startswith("step ")]
            last = next(number for number, line in enumerate(lines) if number > first and line not in rows)
            return "\n".join(lines[first:last]), [line for line in lines if line.startswith("step ")]
    raise AssertionError("no output of train on this page")
