"""Sections of result pages, with the machine, the commit and the command that gave the figures."""

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def write_section(page: Path, title: str, text: str) -> None:
    """Write the section `## title` of a page, in place of the old one or at the end."""
    before = page.read_text() if page.exists() else ""
    section = f"## {title}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", before, re.MULTILINE | re.DOTALL)
    if found is None:
        after = before.rstrip("\n") + "\n\n" + section
    else:
        rest = before[found.end():]
        after = before[:found.start()] + section + ("\n" + rest if rest else "")
    page.write_text(after)


def provenance() -> str:
    """Machine, load, versions, commit and command of a measurement, as Markdown."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    shared = "; other programs shared cores and caches" if load > cores else ""
    module = ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return (f"{cores} CPU cores ({platform.machine()}), load average {load:.1f} at the end{shared}; "
            f"Python {platform.python_version()}, numpy {np.__version__}, commit {commit}.\n\n    {command}")
