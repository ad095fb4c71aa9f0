"""Source of the package, parsed and never imported: modules by name, and what each of them imports."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def parse(source: str) -> ast.Module:
    """Parse a source once, however many tests look at it."""
    return ast.parse(source)


@cache
def nodes(source: str) -> list[ast.AST]:
    """All nodes of a source's tree."""
    return list(ast.walk(parse(source)))


def classes(source: str) -> dict[str, ast.ClassDef]:
    """Classes that a module defines, by name."""
    return {node.name: node for node in parse(source).body if isinstance(node, ast.ClassDef)}


def load_package(folder: str = "moetrain") -> dict[str, str]:
    """Source of every module below a folder, by dotted name; that of a package ends in `__init__`."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
            for path in sorted((ROOT / folder).rglob("*.py"))}


PACKAGE = load_package()


def paths_below(folder: Path) -> list[str]:
    """Python files below a folder, without `.py`; not those that only make it a package."""
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py")]
    return sorted(path.as_posix() for path in paths if path.name != "__init__")


def package(module: str) -> str:
    """Package of a module: moetrain.ops.gating -> ops. moetrain itself has none."""
    name = module.split(".")[1]
    return "" if name == "__init__" else name


def imported_names(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in the file and however it is written."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[:-node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports(sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs of a module and a module of moetrain that it imports."""
    for module, source in sources.items():
        for name in imported_names(module, source):
            if found := _resolve(name, sources):
                yield module, found


def _resolve(name: str, sources: Mapping[str, str]) -> str | None:
    """Module that a dotted name lies in; None when it is not ours."""
    parts = name.split(".")
    if parts[0] != "moetrain":
        return None
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in sources:
            return module
        if f"{module}.__init__" in sources:
            return f"{module}.__init__"
    raise AssertionError(f"{name} is imported and not there")
