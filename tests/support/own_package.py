"""The package of docs/howto/own_parts.md, written into a folder."""

import re
from pathlib import Path

from tests.support.command_line import ROOT

_FILE = re.compile(r"`([\w/]+\.(?:toml|py|yaml))`")
_BLOCK = re.compile(r"\n\n((?:[^\n]+\n)+)\n```(?:toml|python|yaml)\n(.*?)```", re.DOTALL)
FILES = ["pyproject.toml", "my_moe/__init__.py", "my_moe/tempered.py", "my_moe/conf/router/tempered.yaml",
         "train_mine.py"]


def write_own_package(folder: Path) -> None:
    """Write the files of the page: each block below the paragraph that names its file."""
    page = (ROOT / "docs/howto/own_parts.md").read_text(encoding="utf-8")
    blocks = [(_FILE.search(paragraph)[1], text) for paragraph, text in _BLOCK.findall(page)]
    assert [name for name, _ in blocks] == FILES
    for name, text in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
