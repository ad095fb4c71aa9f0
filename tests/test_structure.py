"""Order of the package: imports run downwards only, and nothing in it can be made to run foreign code.

Read from source with `ast`, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

# Each for one purpose, imported by cli/ alone.
APPLICATIONS = ("upcycle", "peft", "compress", "interop", "analysis", "profiling", "report", "doctor")
# From the ground up. A module imports from lines above its own, or from its own package.
ORDER = (
    ("files", "locks", "machine", "streams", "units"),
    ("errors",),
    ("user_code",),
    ("ops", "plan", "config", "checkpoint"),
    ("comm", "routers", "data", "runs"),
    ("losses", "moe"),
    ("parallel",),
    ("model",),
    ("generate", "train", "transform"),
    APPLICATIONS,
    ("launch",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line}
# launch speaks when ranks cannot: before there is a console, or when one was killed.
MAY_PRINT = ("cli", "__main__", "launch")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def load_package() -> dict[str, str]:
    """Source by module name; a package is named with its `__init__`."""
    root = Path(__file__).parents[1] / "moetrain"
    return {".".join(path.relative_to(root.parent).with_suffix("").parts): path.read_text(encoding="utf-8")
            for path in sorted(root.rglob("*.py"))}


PACKAGE = load_package()


# --- imports


def imports(sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(module, module of moetrain that it imports), wherever in the file and however it is written."""
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = module.split(".")[:-node.level] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                targets = [f"{origin}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((module, found) for target in targets if (found := resolve(target, sources)))


def resolve(target: str, sources: Mapping[str, str]) -> str | None:
    """The module that a dotted name lies in; None when it is not ours."""
    if target.split(".")[0] != "moetrain":
        return None
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in sources:
            return name
        if f"{name}.__init__" in sources:
            return f"{name}.__init__"
    raise AssertionError(f"{target} is imported and not there")


def package(module: str) -> str:
    """moetrain.ops.gating -> ops; moetrain itself, which imports nothing, has none."""
    name = module.split(".")[1]
    return "" if name == "__init__" else name


def upward(sources: Mapping[str, str]) -> list[str]:
    return sorted({f"{module} imports {target}" for module, target in imports(sources)
                   if package(target) and package(target) != package(module)
                   and LEVEL[package(target)] >= LEVEL.get(package(module), -1)})


def loop(sources: Mapping[str, str]) -> list[str] | None:
    """Modules that import each other in a circle."""
    edges: dict[str, set[str]] = {}
    for module, target in imports(sources):
        if module != target:
            edges.setdefault(module, set()).add(target)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module):] + [module]
        if module not in done:
            for target in sorted(edges.get(module, ())):
                if found := visit(target, [*path, module]):
                    return found
            done.add(module)
        return None

    return next((found for module in sorted(edges) if (found := visit(module, []))), None)


def test_every_package_has_its_line() -> None:
    assert {package(module) for module in PACKAGE} - {""} <= set(LEVEL)


def test_imports_only_go_down() -> None:
    assert upward(PACKAGE) == []


def test_there_are_no_import_loops() -> None:
    assert loop(PACKAGE) is None


def test_applications_are_imported_by_cli_alone() -> None:
    assert [f"{module} imports {target}" for module, target in imports(PACKAGE)
            if package(target) in APPLICATIONS and package(module) not in ("cli", package(target))] == []


@pytest.mark.parametrize("source", [
    "import moetrain.train.loop", "from moetrain.train.loop import train", "from moetrain.train import loop",
    "from moetrain import train", "from ..train import loop", "from ..train.loop import train as t",
    "def f():\n    from moetrain.train.loop import train",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moetrain.train.loop as loop",
])
def test_an_import_upwards_is_found_however_it_is_written(source: str) -> None:
    sources = {"moetrain.__init__": "", "moetrain.train.__init__": "", "moetrain.train.loop": "",
             "moetrain.ops.gating": source}
    assert len(upward(sources)) == 1


def test_an_import_of_a_neighbour_and_a_loop_are_found() -> None:
    assert upward({"moetrain.ops.a": "import moetrain.plan.b", "moetrain.plan.b": ""})
    sources = {"moetrain.ops.a": "from moetrain.ops import b", "moetrain.ops.b": "def f():\n    from . import c",
             "moetrain.ops.c": "from .a import x", "moetrain.ops.__init__": ""}
    assert upward(sources) == []
    assert loop(sources) == ["moetrain.ops.a", "moetrain.ops.b", "moetrain.ops.c", "moetrain.ops.a"]


# Whose packages know no torch, so that verbs which only look at files start at once.
NO_TORCH = ("checkpoint", "runs", "config")


def imports_torch(source: str) -> bool:
    """Whether a module imports torch, wherever in the file."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] == "torch" for name in names)


def with_torch(sources: Mapping[str, str]) -> set[str]:
    """Modules that import torch, themselves or by what they import."""
    found = {module for module, source in sources.items() if imports_torch(source)}
    edges = [(module, target) for module, target in imports(sources) if module != target]
    while more := {module for module, target in edges if target in found} - found:
        found |= more
    return found


def test_the_format_of_saves_and_the_files_of_runs_need_no_torch() -> None:
    assert [module for module in sorted(with_torch(PACKAGE)) if package(module) in NO_TORCH] == []


def test_an_import_of_torch_is_found_where_it_hides() -> None:
    sources = {"moetrain.runs.a": "from moetrain.ops import b", "moetrain.ops.b": "def f():\n    from torch import nn", "moetrain.runs.c": ""}
    assert with_torch(sources) == {"moetrain.runs.a", "moetrain.ops.b"}


# --- tests


def test_no_test_imports_a_test() -> None:
    """What tests share is in tests/support."""
    root = Path(__file__).parents[1]
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else [])
            found += [f"{path.relative_to(root)}: {name}" for name in names if re.search(r"(^|\.)test_", name)]
    assert found == []


# --- files


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [module for module in PACKAGE if drawers & set(module.split("."))] == []


def test_init_files_only_hand_names_on() -> None:
    for module, source in PACKAGE.items():
        if module.endswith(".__init__"):
            wrong = [ast.unparse(node) for node in ast.parse(source).body if not is_hand_over(node, module)]
            assert wrong == [], module


def is_hand_over(node: ast.stmt, module: str) -> bool:
    """A docstring, an import, `__all__`; in the package's own file the version."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        allowed = ("__all__", "__version__") if module == "moetrain.__init__" else ("__all__",)
        return node.targets[0].id in allowed
    return isinstance(node, (ast.Import, ast.ImportFrom)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str))


# --- calls


def offences(module: str, source: str) -> list[str]:
    """Prints where lines belong to the console, and whatever could run code that comes with data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="print")) if package(module) not in MAY_PRINT:
                found.append("print")
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as name):
                found.append(f"torch.{name}")
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                found.append("allow_pickle")
            case ast.Name(id="instantiate") | ast.Attribute(attr="instantiate") if module != "moetrain.config.build":
                found.append("instantiate")
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in UNPICKLERS]
            case ast.ImportFrom(module=str(origin), names=names):
                found += [origin] if origin.split(".")[0] in UNPICKLERS else []
                if origin == "torch":
                    found += [f"torch.{alias.name}" for alias in names if alias.name in ("load", "save")]
                if module != "moetrain.config.build":
                    found += ["instantiate" for alias in names if alias.name == "instantiate"]
    return [f"{module}: {name}" for name in found]


# Packages that read what lies in a folder of a run or of data, where anybody may have put anything: they open it by moetrain.files.
READERS = ("checkpoint", "comm", "data", "generate", "interop", "launch", "report", "runs", "train")
# Files that no user makes: of the kernel, of installed packages, and new ones that must not exist.
OTHER_FILES = {"moetrain.launch.ranks_of_agent", "moetrain.runs.attempts", "moetrain.runs.lock", "moetrain.data.corpus",
               "moetrain.checkpoint.disk"}


def bare_opens(module: str, source: str) -> list[str]:
    """Files opened as they come: a pipe would be waited for, a link followed anywhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="open"), args=[ast.Call(func=ast.Name(id="open_descriptor")), *_]):
                pass
            case ast.Call(func=ast.Name(id="open")):
                found.append("open")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="open")):
                found.append("os.open")
            case ast.Call(func=ast.Attribute(attr="open"), args=[] | [ast.Constant(), *_]):      # of a path: the mode comes first
                found.append(".open")
            case ast.Call(func=ast.Attribute(attr="read_text" | "read_bytes" | "write_text" | "write_bytes" | "memmap" | "fromfile"
                                             | "safe_open" | "load_file" as name)):
                found.append(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="np"), attr="load")):
                found.append("np.load")
    return [f"{module}: {name}" for name in found]


def test_files_of_runs_and_data_are_opened_with_suspicion() -> None:
    assert [found for module, source in PACKAGE.items() if package(module) in READERS and module not in OTHER_FILES
            for found in bare_opens(module, source)] == []


@pytest.mark.parametrize("source", ["open(p)", "open(p, 'rb')", "p.open()", "p.open('rb')", "os.open(p, 0)", "p.read_text()", "p.read_bytes()",
                                    "np.load(p)", "np.memmap(p)", "np.fromfile(p)", "p.write_text('')", "safetensors.safe_open(p)"])
def test_a_bare_open_is_found(source: str) -> None:
    assert len(bare_opens("moetrain.train.loop", source)) == 1
    assert bare_opens("moetrain.train.loop", "open_regular(p)\narchive.open(member)\nopen(open_descriptor(p, 0), 'rb')") == []


def test_nothing_prints_unpickles_or_evaluates() -> None:
    assert [offence for module, source in PACKAGE.items() for offence in offences(module, source)] == []


@pytest.mark.parametrize("source", [
    "print(1)", "x = eval('1')", "exec('')", "import pickle", "from pickle import loads", "torch.load(p)",
    "from torch import load", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)",
    "from hydra.utils import instantiate", "hydra.utils.instantiate(x)",
])
def test_an_offence_is_found(source: str) -> None:
    assert len(offences("moetrain.train.loop", source)) == 1


def test_what_looks_alike_is_none() -> None:
    assert offences("moetrain.train.loop", "model.eval()\nconsole.print(1)\nnp.load(p, allow_pickle=False)") == []
    assert offences("moetrain.cli.train", "print(1)") == []
    assert offences("moetrain.config.build", "from hydra.utils import instantiate\ninstantiate(x)") == []


# --- devices


MEMORY = re.compile(r"mem_get_info|(max_)?memory_(allocated|reserved)|memory_stats|reset_peak_memory_stats|get_device_properties")


def questions_about_memory(module: str, source: str) -> list[str]:
    """What a file asks torch about the memory of a device."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [f"{module}: {name}" for name in names if MEMORY.fullmatch(name)]


def test_one_file_asks_about_the_memory_of_a_device() -> None:
    asked = {module: questions_about_memory(module, source) for module, source in PACKAGE.items()}
    assert {module for module, questions in asked.items() if questions} == {"moetrain.train.memory.device_memory"}


@pytest.mark.parametrize("source", ["torch.cuda.mem_get_info()", "from torch.cuda import memory_reserved", "cuda.max_memory_allocated(d)",
                                    "torch.cuda.get_device_properties(d).total_memory", "torch.accelerator.memory_allocated()"])
def test_a_question_about_memory_is_found(source: str) -> None:
    assert len(questions_about_memory("moetrain.train.loop", source)) == 1
