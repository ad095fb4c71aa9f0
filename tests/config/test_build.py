"""Parts: only what moetrain defines is built, and a wrong argument is named before and while building."""

import ast
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

import moetrain
from moetrain.config import build as module
from moetrain.config.build import FAMILIES, SIZES, Family, NoSuchPart, arguments, build
from moetrain.config.compose import compose
from moetrain.config.groups import config_dir, group_options
from moetrain.config.values import Misfit, fit, show
from moetrain.config.yaml_file import load
from moetrain.errors import ConfigError, ConfigErrors

ROUTER = "moetrain.routers.topk.TopKRouter"


def test_build_hands_sizes_to_those_that_take_them() -> None:
    router = build(compose([]).router, "router", dim=16, num_experts=4, top_k=2)
    assert type(router).__name__ == "TopKRouter" and router.top_k == 2
    assert build(compose([]).balance, "balance", dim=16, num_experts=4, top_k=2).weight == 0.01


@pytest.mark.parametrize("node, number, text", [
    ({"_target_": ROUTER, "wieghts": "raw"}, 50, "wieghts"),
    ({"_target_": ROUTER, "top_k": 3}, 50, "top_k"),
    ({"_target_": ROUTER, "_partial_": True}, 50, "_partial_"),
    ({"_target_": ROUTER, "weights": "none"}, 51, "weights=none"),
    ({}, 122, "compose"),
])
def test_build_refuses(node: dict[str, Any], number: int, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(node, "router", dim=16, num_experts=4, top_k=2)
    assert caught.value.id == f"E-CONFIG-{number:03d}" and text in str(caught.value)


# What a config may name in place of a part, by the family it is given to, and why it is refused.
FOREIGN = [
    ("router", "os.system", "outside moetrain.routers"),
    ("router", "moetrain.__main__.main", "outside moetrain.routers"),
    ("capacity", "moetrain.comm.exchange.backends._package", "outside moetrain.moe"),
    ("capacity", "moetrain.moe.capacity.place_in_queue", "descend from"),
    ("router", "moetrain.routers.topk.Tensor", "defines no Tensor"),
    ("router", "moetrain.routers.topk.GroupLimitedRouter", "defines no GroupLimitedRouter"),
    ("router", "moetrain.routers.groups.GroupLimitedRouter", "does not define scores"),
    ("router", "moetrain.routers.base.Router", "does not define scores"),
    ("router", "moetrain.routers.base.drop_padding", "descend from"),
    ("router", "moetrain.routers.none.Router", "no module"),
    ("router", "moetrain.routersx.topk.TopKRouter", "outside moetrain.routers"),
    ("router", "moetrain.routers..topk.TopKRouter", "outside moetrain.routers"),
    ("router", "moetrain.routers./tmp/x.TopKRouter", "outside moetrain.routers"),
    ("router", "", "nothing is outside"),
    ("router", "moetrain.losses.z.ZLoss", "outside moetrain.routers"),
    ("loss", "moetrain.losses.base.AuxLoss", "does not define"),
    ("balance", "moetrain.losses.z.ZLoss", "descend from"),
    ("planner", "moetrain.plan.planners.base.Planner", "does not define"),
    ("planner", "moetrain.plan.planners.base.LayerPlan", "descend from"),
    ("indexed", "moetrain.interop.megatron._trained", "descend from"),
]


@pytest.mark.parametrize("family, target, why", FOREIGN)
def test_a_target_is_a_part_of_its_family_or_nothing(family: str, target: str, why: str) -> None:
    with pytest.raises(NoSuchPart, match=why):
        arguments(target, family)
    if target:
        with pytest.raises(ConfigError) as caught:
            build({"_target_": target}, family)
        assert caught.value.id == "E-CONFIG-052" and why in str(caught.value)


HALVES = '''
from moetrain.losses.base import AuxLoss
from moetrain.routers.base import LinearRouter

class Chooses(LinearRouter):
    def choose(self, order_TC, context):
        return order_TC

class Values(AuxLoss):
    pool: object = None

    def value(self, stats, pooled):
        return stats.entropy_sum

class Unpooled(AuxLoss):
    def value(self, stats, pooled):
        return stats.entropy_sum

    def slopes(self, stats, pooled):
        return {"entropy_sum": 1.0}
'''


@pytest.mark.parametrize("family, name, why", [
    ("router", "Chooses", "does not define scores"), ("loss", "Values", "does not define slopes"),
    ("loss", "Unpooled", "does not define pool"), ("router", "Values", "is no router: those descend from")])
def test_half_a_part_is_refused_by_the_name_of_what_is_missing(
        family: str, name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_parts").mkdir()
    (tmp_path / "half_parts/__init__.py").write_text(HALVES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOETRAIN_PACKAGES", "half_parts")
    with pytest.raises(NoSuchPart, match=why):
        arguments(f"half_parts.{name}", family)


def test_every_option_of_a_group_is_of_its_family() -> None:
    for section in set(FAMILIES) - {"indexed"}:
        assert group_options()[section]
        for option in group_options()[section]:
            tree = load(config_dir() / section / f"{option}.yaml")
            arguments((tree[option] if section == "loss" else tree)["_target_"], section)


def test_no_argument_of_a_part_can_name_code() -> None:
    """Numbers, switches, choices from a list: no free text, which a constructor might import.

    A path is of a file of numbers, which is read without pickle.
    """
    for section in set(FAMILIES) - {"indexed"}:
        root = Path(moetrain.__file__).parents[1]
        for file in sorted((root / FAMILIES[section].package.replace(".", "/")).rglob("*.py")):
            module_name = ".".join(file.relative_to(root).with_suffix("").parts)
            for node in ast.parse(file.read_text()).body:
                try:
                    keys = arguments(f"{module_name}.{getattr(node, 'name', '')}", section)
                except NoSuchPart:
                    continue
                free = [key for name, key in keys.items() if not name.endswith("_path") and name not in SIZES
                        and {str, Any} & {key.type, *get_args(key.type)}]
                assert not free, (file, keys)


def test_instantiate_has_one_caller() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8"))
             for path in Path(moetrain.__file__).parent.rglob("*.py")}
    callers = [path for path, tree in trees.items()
               if any(isinstance(node, ast.Name) and node.id == "instantiate" for node in ast.walk(tree))]
    assert [path.name for path in callers] == ["build.py"] and callers[0].parent.name == "config"


def test_arguments_are_read_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.py").write_text(
        "class Base:\n    def __init__(self, a: int, *, b: float | None = None, "
        "c: Literal['x', 'off'] = 'x', d: list[int] = [1], e: Tensor = None, f=2, **rest): ...\n")
    (tmp_path / "parts.py").write_text(
        "import no_such_package\nfrom moetrain.base import Base\nclass Child(Base):\n    pass\n"
        "class Free: ...\ndef make(size: int = 3): ...\n")
    of_topk = [name for name in compose([]).router if name != "_target_"]
    typed = [f"router.{name}={show(value)}" for name, value in compose([]).router.items() if name in of_topk]
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    monkeypatch.setattr(module, "FAMILIES",
                        {**FAMILIES, "router": Family("moetrain.parts", "moetrain.base.Base"),
                                             "free": Family("moetrain.parts", "moetrain.parts.Free"),
                         "make": Family("moetrain.parts", "moetrain.parts.make")})
    found = arguments("moetrain.parts.Child", "router")
    assert {name: (key.type, key.default) for name, key in found.items()} == {
        "a": (int, MISSING), "b": (float | None, None), "c": (Literal["x", "off"], "x"),
        "d": (list[int], [1]),
        "e": (Any, None), "f": (Any, 2)}
    assert list(arguments("moetrain.parts.make",
                          "make")) == ["size"] and arguments("moetrain.parts.Free", "free") == {}
    for target in ("moetrain.parts.Base", "moetrain.parts.no_such_package", "moetrain.none.X", "os.system",
                   "X", ""):
        with pytest.raises(NoSuchPart):
            arguments(target, "router")

    def refused(*more: str) -> list[str]:
        with pytest.raises(ConfigErrors) as caught:
            compose(["router._target_=moetrain.parts.Child", *more])
        return [error.id[-3:] + " " + error.what for error in caught.value.errors
                if error.what.startswith(("router", "unknown key r"))]

    # What only the option set goes with its class; what was typed is refused.
    assert refused() == ["011 router.a is missing"]
    assert refused(*typed) == [*(f"009 unknown key router.{name}" for name in of_topk),
                               "011 router.a is missing"]
    assert refused("router.a=x", "router.c=y") == ["004 router.a=x is not int",
                                                   "005 router.c=y is not one of its values"]


@pytest.mark.parametrize("declared, why", [
    ('{"p": "in (0, 1]"}', ""), ("dict(p='above 0')", "computed, not a literal"),
    ("{**Base.BOUNDS}", "computed, not a literal"),
    ("['p']", "no attribute 'items'"), ('{"q": "above 0"}', "no argument 'q'"),
    ('{"p": "positive"}', "'positive' is no bounds"),
    ('{"p": 3}', "int"), ('{"kind": "above 0"}', "kind is not annotated as a number"),
    ('{"p": "above 0; halves top_k"}', "is no relation"),
])
@pytest.mark.parametrize("assigns", ["BOUNDS = ", "BOUNDS: dict[str, str] = "])
def test_bounds_that_cannot_be_read_are_an_error_with_the_line(
        declared: str, why: str, assigns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass adds to the bounds of its base, and need not take all of its arguments."""
    (tmp_path / "parts.py").write_text(
        f"class Base:\n    BOUNDS = {{'n': '1 or more'}}\n    def __init__(self, n: int = 1): ...\n"
        f"class Part(Base):\n    {assigns}{declared}\n"
        f"    def __init__(self, p: float = 0.5, kind: Literal['a', 'b'] = 'a'): ...\n"
        f"class Same(Base):\n    BOUNDS = {{'n': '2 or more'}}\n")
    monkeypatch.setattr(module, "_PACKAGE", tmp_path)
    monkeypatch.setattr(module, "FAMILIES",
                        {**FAMILIES, "router": Family("moetrain.parts", "moetrain.parts.Base")})
    assert arguments("moetrain.parts.Base", "router")["n"].bounds == "1 or more"
    assert arguments("moetrain.parts.Same", "router")["n"].bounds == "2 or more"
    if not why:
        assert [key.bounds for key in arguments("moetrain.parts.Part",
                                                "router").values()] == ["in (0, 1]", ""]
        return
    with pytest.raises(ConfigError) as caught:
        arguments("moetrain.parts.Part", "router")
    assert caught.value.id == "E-CONFIG-054" and why in caught.value.why
    assert caught.value.what == "BOUNDS of Part cannot be read"
    assert caught.value.where == "moetrain/parts.py, line 5" and 'BOUNDS = {"p"' in caught.value.next


@pytest.mark.parametrize("value, kind, result", [
    (1, float, 1.0), (1, int, 1), ("x", str, "x"), (5, str, "5"), (None, int | None, None),
    ([1, 2], list[float], [1.0, 2.0]),
    (3, int | list[int], 3), ([3], int | list[int], [3]), (False, Literal["off", "on"], "off"),
    (True, bool, True)])
def test_what_fits(value: Any, kind: Any, result: Any) -> None:
    assert fit(value, kind) == result and type(fit(value, kind)) is type(result)


@pytest.mark.parametrize("value, kind", [
    (True, int), (False, float), (1.0, int), ("1", int), (None, int), (1, bool), ("true", bool),
    ([1.5], list[int]), (1, list[int]),
    (["a"], int | list[int]), ("c", Literal["a", "b"]), (True, Literal["off"]), (None, str), ({}, str)])
def test_what_does_not_fit(value: Any, kind: Any) -> None:
    with pytest.raises(Misfit):
        fit(value, kind)
