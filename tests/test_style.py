"""Style: ruff and mypy find nothing (pyproject.toml), and files and functions are as short as one idea."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.package_source import PACKAGE, ROOT, load_package, nodes, parse

# --- ruff


def check(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    return subprocess.run([*command, *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_ruff_finds_nothing() -> None:
    found = check("moetrain", "tests", "tools")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("source", ["import os\n", "print(missing)\n",
                                    "import sys\nimport os\n\nprint(os, sys)\n"])
def test_it_looks(tmp_path: Path, source: str) -> None:
    (tmp_path / "file.py").write_text(source)
    assert check("--config", ROOT / "pyproject.toml", tmp_path / "file.py").returncode == 1


# --- types


def types(*words: object) -> subprocess.CompletedProcess:
    needs.module("mypy", extra="dev")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_mypy_finds_nothing() -> None:
    found = types()
    assert found.returncode == 0, found.stdout + found.stderr


def test_mypy_looks(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("def double(x: int) -> str:\n    return 2 * x\n")
    found = types("--cache-dir", tmp_path / "cache", tmp_path / "file.py")
    assert found.returncode == 1 and "[return-value]" in found.stdout, found.stdout + found.stderr


# --- sizes

# Files and functions that are longer and one idea all the same.
LONGER: set[str] = set()
FILE_LINES, FUNCTION_LINES = 400, 60


def too_long(module: str, source: str) -> list[str]:
    """The file and its functions past the limits; a function's docstring is not counted."""
    found = [f"{module}: {lines} lines"] if (lines := len(source.splitlines())) > FILE_LINES else []
    for node in nodes(source):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            docstring = first.end_lineno - first.lineno + 1 if _is_docstring(first) else 0
            if (lines := node.end_lineno - node.lineno + 1 - docstring) > FUNCTION_LINES:
                found.append(f"{module}.{node.name}: {lines} lines")
    return found


def _is_docstring(node: ast.stmt) -> bool:
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))


def _hands_on(node: ast.stmt, module: str) -> bool:
    """Whether a statement of an `__init__` is a docstring, an import, `__all__` or the package's version."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        allowed = ("__all__", "__version__") if module == "moetrain.__init__" else ("__all__",)
        return node.targets[0].id in allowed
    return isinstance(node, (ast.Import, ast.ImportFrom)) or _is_docstring(node)


def test_sections_of_docstrings_begin_on_a_line_of_their_own() -> None:
    """Text behind `Args:` is one paragraph for ruff, which then looks at no argument."""
    beside = re.compile(r"^ +(Args|Returns|Raises|Yields): \S", re.MULTILINE)
    assert beside.search("def f():\n    'Do.\n\n    Args: x: a number.'")
    assert [module for module, source in {**PACKAGE, **load_package("tools")}.items()
            if beside.search(source)] == []


def test_files_and_functions_have_one_idea() -> None:
    sources = {**PACKAGE, **load_package("tools")}
    found = [fault for module, source in sources.items() for fault in too_long(module, source)]
    assert {fault.partition(":")[0] for fault in found} == LONGER, found


@pytest.mark.parametrize("source, found", [
    ("x = 1\n" * 401, 1), ("x = 1\n" * 400, 0),
    ("class A:\n    def f():\n" + "        x = 1\n" * 60, 1), ("async def f():\n" + "    x = 1\n" * 60, 1),
    ("def f():\n    '''\n" + "    text\n" * 60 + "    '''\n" + "    x = 1\n" * 59, 0),
])
def test_what_is_too_long_is_found(source: str, found: int) -> None:
    assert len(too_long("moetrain.ops.a", source)) == found


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    sources = {**PACKAGE, **load_package("tools"), **load_package("tests")}
    assert [module for module in sources if drawers & set(module.split("."))] == []


def test_init_files_only_hand_names_on() -> None:
    assert [f"{module}: {ast.unparse(node)}" for module, source in PACKAGE.items()
            if module.endswith(".__init__")
            for node in parse(source).body if not _hands_on(node, module)] == []
