"""Calls that the package does not make.

It runs no code that comes with data (pickle, eval, torch.load), prints on the command line alone, opens the
files of users through `moetrain.files`, and asks about the memory of a device in one place.
"""

import ast
import re

import pytest

from tests.support.package_source import PACKAGE, nodes, package

# launch speaks when ranks cannot: before there is a console, or when one was killed.
MAY_PRINT = ("cli", "__main__", "launch")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The only caller of `instantiate`: it has checked that the class is one of ours or the user's own.
BUILD = "moetrain.config.build"


# --- code that comes with data, and print


def forbidden_calls(module: str, source: str) -> list[str]:
    """`print` where lines belong to the console, and calls that could run code from data."""
    found = []
    for node in nodes(source):
        match node:
            case ast.Call(func=ast.Name(id="print")) if package(module) not in MAY_PRINT:
                found.append("print")
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as name):
                found.append(f"torch.{name}")
            case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                found.append("allow_pickle")
            case ast.Name(id="instantiate") | ast.Attribute(attr="instantiate") if module != BUILD:
                found.append("instantiate")
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in UNPICKLERS]
            case ast.ImportFrom(module=str(origin), names=names):
                found += [origin] if origin.split(".")[0] in UNPICKLERS else []
                if origin == "torch":
                    found += [f"torch.{alias.name}" for alias in names if alias.name in ("load", "save")]
                if module != BUILD:
                    found += ["instantiate" for alias in names if alias.name == "instantiate"]
    return [f"{module}: {name}" for name in found]


def test_nothing_prints_unpickles_or_evaluates() -> None:
    assert [found for module, source in PACKAGE.items() for found in forbidden_calls(module, source)] == []


@pytest.mark.parametrize("source", [
    "print(1)", "x = eval('1')", "exec('')", "import pickle", "from pickle import loads", "torch.load(p)",
    "from torch import load", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)",
    "from hydra.utils import instantiate", "hydra.utils.instantiate(x)",
])
def test_a_forbidden_call_is_found(source: str) -> None:
    assert len(forbidden_calls("moetrain.train.loop", source)) == 1


@pytest.mark.parametrize("module, source", [
    ("moetrain.train.loop", "model.eval()\nconsole.print(1)\nnp.load(p, allow_pickle=False)"),
    ("moetrain.cli.train", "print(1)"),
    (BUILD, "from hydra.utils import instantiate\ninstantiate(x)"),
])
def test_what_looks_alike_is_allowed(module: str, source: str) -> None:
    assert forbidden_calls(module, source) == []


# --- files that anybody may have put there


# Packages that read folders of runs or of data. They open files by `moetrain.files`, which neither waits
# for a pipe nor follows a link out of the folder.
READERS = ("checkpoint", "comm", "data", "generate", "interop", "launch", "report", "runs", "train")
# Files that no user makes: of the kernel, of installed packages, and new ones that must not exist.
OTHER_FILES = {"moetrain.launch.ranks_of_agent", "moetrain.runs.attempts", "moetrain.runs.lock",
               "moetrain.data.corpus.builtin", "moetrain.checkpoint.disk"}
OPENERS = {"read_text", "read_bytes", "write_text", "write_bytes",
           "memmap", "fromfile", "safe_open", "load_file"}


def bare_opens(module: str, source: str) -> list[str]:
    """Calls that open a file without the checks of `moetrain.files`."""
    found = []
    for node in nodes(source):
        match node:
            case ast.Call(func=ast.Name(id="open"), args=[ast.Call(func=ast.Name(id="open_descriptor")), *_]):
                pass
            case ast.Call(func=ast.Name(id="open")):
                found.append("open")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="open")):
                found.append("os.open")
            # Path.open: the mode comes first. zipfile's and tarfile's open takes the name of a member.
            case ast.Call(func=ast.Attribute(attr="open"), args=[] | [ast.Constant(), *_]):
                found.append(".open")
            case ast.Call(func=ast.Attribute(attr=name)) if name in OPENERS:
                found.append(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="np"), attr="load")):
                found.append("np.load")
    return [f"{module}: {name}" for name in found]


def test_files_of_runs_and_data_are_opened_with_suspicion() -> None:
    assert [found for module, source in PACKAGE.items()
            if package(module) in READERS and module not in OTHER_FILES
            for found in bare_opens(module, source)] == []


@pytest.mark.parametrize("source", [
    "open(p)", "open(p, 'rb')", "p.open()", "p.open('rb')", "os.open(p, 0)",
    "p.read_text()", "p.read_bytes()", "p.write_text('')",
    "np.load(p)", "np.memmap(p)", "np.fromfile(p)", "safetensors.safe_open(p)",
])
def test_a_bare_open_is_found(source: str) -> None:
    assert len(bare_opens("moetrain.train.loop", source)) == 1


def test_an_open_of_a_checked_file_is_none() -> None:
    source = "open_regular(p)\narchive.open(member)\nopen(open_descriptor(p, 0), 'rb')"
    assert bare_opens("moetrain.train.loop", source) == []


# --- memory of a device


MEMORY = re.compile(
    r"mem_get_info|(max_)?memory_(allocated|reserved)|memory_stats|reset_peak_memory_stats|get_device_properties")


def memory_queries(module: str, source: str) -> list[str]:
    """Functions of torch by which a module asks about the memory of a device."""
    names = [node.attr for node in nodes(source) if isinstance(node, ast.Attribute)]
    names += [alias.name for node in nodes(source) if isinstance(node, ast.ImportFrom)
              for alias in node.names]
    return [f"{module}: {name}" for name in names if MEMORY.fullmatch(name)]


def test_one_file_asks_about_the_memory_of_a_device() -> None:
    asking = {module for module, source in PACKAGE.items() if memory_queries(module, source)}
    assert asking == {"moetrain.train.memory.device_memory"}


@pytest.mark.parametrize("source", [
    "torch.cuda.mem_get_info()", "from torch.cuda import memory_reserved", "cuda.max_memory_allocated(d)",
    "torch.cuda.get_device_properties(d).total_memory", "torch.accelerator.memory_allocated()",
])
def test_a_question_about_memory_is_found(source: str) -> None:
    assert len(memory_queries("moetrain.train.loop", source)) == 1
