"""Parts: only what moetrain defines is built, and a wrong argument is named before and while building."""

import ast
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

import pytest

import moetrain
from moetrain.config import build as module
from moetrain.config.build import NoSuchPart, arguments, build
from moetrain.config.compose import compose
from moetrain.config.values import Misfit, fit
from moetrain.errors import ConfigError, ConfigErrors

ROUTER = "moetrain.routers.topk.TopKRouter"


def test_build_hands_sizes_to_those_that_take_them() -> None:
    router = build(compose([]).router, dim=16, num_experts=4, top_k=2)
    assert type(router).__name__ == "TopKRouter" and router.top_k == 2
    assert build(compose([]).balance, dim=16, num_experts=4, top_k=2).weight == 0.01


@pytest.mark.parametrize("node, number, text", [
    ({"_target_": ROUTER, "wieghts": "raw"}, 50, "wieghts"),
    ({"_target_": ROUTER, "top_k": 3}, 50, "top_k"),
    ({"_target_": ROUTER, "_partial_": True}, 50, "_partial_"),
    ({"_target_": ROUTER, "weights": "none"}, 51, "weights=none"),
    ({"_target_": "os.system", "command": "true"}, 52, "outside moetrain"),
    ({"_target_": "moetrain.routers.topk.Tensor"}, 52, "not defined in moetrain"),
    ({"_target_": "moetrain.config.build.importlib.import_module"}, 52, "cannot be found"),
    ({"_target_": "moetrain.routers.none.Router"}, 52, "cannot be found"),
    ({}, 52, "outside moetrain"),
])
def test_build_refuses(node: dict[str, Any], number: int, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(node, dim=16, num_experts=4, top_k=2)
    assert caught.value.id == f"E-CONFIG-{number:03d}" and text in str(caught.value)


def test_instantiate_has_one_caller() -> None:
    callers = [path for path in Path(moetrain.__file__).parent.rglob("*.py") if "instantiate" in {
        node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}]
    assert [path.name for path in callers] == ["build.py"] and callers[0].parent.name == "config"


def test_arguments_are_read_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.py").write_text(
        "class Base:\n    def __init__(self, a: int, *, b: float | None = None, c: Literal['x', 'off'] = 'x', "
        "d: list[int] = [1], e: Tensor = None, f=2, **rest): ...\n")
    (tmp_path / "parts.py").write_text(
        "import no_such_package\nfrom moetrain.base import Base\nclass Child(Base):\n    pass\nclass Free: ...\ndef make(size: int = 3): ...\n")
    of_topk = [name for name in compose([]).router if name != "_target_"]
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    found = arguments("moetrain.parts.Child")
    assert {name: (key.type, key.default) for name, key in found.items()} == {
        "a": (int, MISSING), "b": (float | None, None), "c": (Literal["x", "off"], "x"), "d": (list[int], [1]),
        "e": (Any, None), "f": (Any, 2)}
    assert list(arguments("moetrain.parts.make")) == ["size"] and arguments("moetrain.parts.Free") == {}
    for target in ("moetrain.parts.Base", "moetrain.parts.no_such_package", "moetrain.none.X", "os.system", "X", ""):
        with pytest.raises(NoSuchPart):
            arguments(target)

    def refused(*more: str) -> list[str]:
        with pytest.raises(ConfigErrors) as caught:
            compose(["router._target_=moetrain.parts.Child", "balance._target_=moetrain.parts.Free", *more])
        return [error.id[-3:] + " " + error.what for error in caught.value.errors if error.what.startswith(("router", "unknown key r"))]

    assert refused() == [*(f"009 unknown key router.{name}" for name in of_topk), "011 router.a is missing"]
    assert refused(*(f"~router.{name}" for name in of_topk), "router.a=x", "router.c=y") == ["004 router.a=x is not int", "005 router.c=y is not one of its values"]


@pytest.mark.parametrize("value, kind, result", [
    (1, float, 1.0), (1, int, 1), ("x", str, "x"), (5, str, "5"), (None, int | None, None), ([1, 2], list[float], [1.0, 2.0]),
    (3, int | list[int], 3), ([3], int | list[int], [3]), (False, Literal["off", "on"], "off"), (True, bool, True)])
def test_what_fits(value: Any, kind: Any, result: Any) -> None:
    assert fit(value, kind) == result and type(fit(value, kind)) is type(result)


@pytest.mark.parametrize("value, kind", [
    (True, int), (False, float), (1.0, int), ("1", int), (None, int), (1, bool), ("true", bool), ([1.5], list[int]), (1, list[int]),
    (["a"], int | list[int]), ("c", Literal["a", "b"]), (True, Literal["off"]), (None, str), ({}, str)])
def test_what_does_not_fit(value: Any, kind: Any) -> None:
    with pytest.raises(Misfit):
        fit(value, kind)
