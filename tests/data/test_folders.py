"""Order of the folders of moetrain/data: imports between them run downwards only.

Sources are parsed, never imported, so imports inside functions count as well.
"""

import re
from collections.abc import Mapping

import pytest

from tests.support.package_source import PACKAGE, imports, package

# A module imports from lines above its own, or from its own folder; the files beside the folders from any.
ORDER = (
    ("account", "tokens", "tokenizers"),
    ("reading",),
    ("corpus",),
    ("preparation", "pretokenized"),
    ("batches",),
)
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line}
BESIDE = len(ORDER)                          # level of the files beside the folders


def upward_imports(sources: Mapping[str, str]) -> list[str]:
    """Imports in a folder of data/ of a folder that is not above it, or of a file beside the folders."""
    edges = [(module, target) for module, target in imports(sources)
             if package(module) == package(target) == "data"]
    return sorted({f"{module} imports {target}" for module, target in edges
                   if LEVEL.get(folder(module), BESIDE) <= LEVEL.get(folder(target), BESIDE)
                   and folder(module) in LEVEL and folder(module) != folder(target)})


def folder(module: str) -> str:
    """moetrain.data.tokens.shards -> tokens; moetrain.data.loader -> loader."""
    return module.split(".")[2]


def test_imports_between_folders_only_go_down() -> None:
    assert ({folder(module) for module in PACKAGE if re.fullmatch(r"moetrain\.data\.\w+\.\w+", module)}
            == set(LEVEL))
    assert upward_imports(PACKAGE) == []


@pytest.mark.parametrize("module, target", [
    ("moetrain.data.tokens.c", "moetrain.data.reading.b"),
    ("moetrain.data.preparation.c", "moetrain.data.pretokenized.b"),
    ("moetrain.data.reading.c", "moetrain.data.loader"),
])
def test_an_import_upwards_is_found(module: str, target: str) -> None:
    sources = {"moetrain.data.loader": "from moetrain.data.reading import b", "moetrain.data.reading.b": "",
               "moetrain.data.batches.a": "from moetrain.data.reading import b",
               "moetrain.data.pretokenized.b": ""}
    assert upward_imports(sources) == []
    assert len(upward_imports({**sources, module: f"import {target}"})) == 1
