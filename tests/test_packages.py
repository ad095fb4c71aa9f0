"""Parts in a package of the user's own: allowed by command or code alone (docs/howto/own_parts.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import packages
from moetrain.config.build import NoSuchPart, NotAllowed, arguments, build
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.errors import ConfigErrors
from tests.support.command_line import ROOT, metrics, moetrain, weights
from tests.support.own_package import write_own_package

SHORT = ("experiment=debug", "run.steps=3", "run.device=cpu", "log.wandb=off", "run.dtype=float64")


@pytest.mark.slow
def test_the_package_of_the_page_is_installed_and_trains(tmp_path: Path) -> None:
    source, site, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    source.mkdir()
    work.mkdir()
    write_own_package(source)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
                    "--no-build-isolation", "--target", str(site), str(source)], check=True, timeout=120)
    assert (site / "my_moe/conf/router/tempered.yaml").is_file()
    found = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    run = ("router=tempered", "router.temperature=0.7")
    allow = "run.packages=[my_moe]"

    moetrain("train", *SHORT, "run.name=alone", allow, *run, cwd=work, **found)
    # The environment allows it on every rank, too; the same numbers on two.
    moetrain("train", *SHORT, "run.name=two", *run, "parallel=ep", "run.nproc=2", cwd=work, **found,
             MOETRAIN_PACKAGES="my_moe")
    one, two = (metrics(work / "runs" / name) for name in ("alone", "two"))
    assert [line["loss/ce"] for line in two] == pytest.approx([line["loss/ce"] for line in one], rel=1e-10)
    said = moetrain("eval", "alone", "eval.windows=1", cwd=work, code=2, **found)
    assert "E-CONFIG-244" in said and "run.packages=[my_moe]" in said
    assert "mean" in moetrain("eval", "alone", "eval.windows=1", allow, cwd=work, **found)

    # A script beside the package allows it for the ranks that it starts, which have another folder first.
    moetrain("train", *SHORT, "run.name=script", *run, "parallel=ep", "run.nproc=2", cwd=work,
             launcher=(str(source / "train_mine.py"),))
    assert weights(work / "runs/script") == weights(work / "runs/two")


def test_what_is_not_allowed_is_refused_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    target = "my_moe.tempered.TemperedRouter"
    with pytest.raises(NotAllowed):
        arguments(target, "router")
    with pytest.raises(ConfigErrors, match="E-CONFIG-244"):
        compose([f"router._target_={target}"])
    # A file cannot allow a package: not an experiment, and not the config that a run has recorded.
    (tmp_path / "my_moe/conf/experiment").mkdir()
    (tmp_path / "my_moe/conf/experiment/mine.yaml").write_text(
        "# @package _global_\n\nrun:\n  packages: [xml]\n")
    with pytest.raises(ConfigErrors, match="E-CONFIG-243"):
        compose(["run.packages=[my_moe]", "experiment=mine"])
    assert packages.allowed() == ("my_moe",)
    assert "tempered" in group_options()["router"]
    router = build(compose(["router=tempered"]).router, "router", dim=8, num_experts=4, top_k=2)
    assert type(router).__name__ == "TemperedRouter" and router.temperature == 0.5
    with pytest.raises(ConfigErrors, match=r"(?s)E-CONFIG-064.*above 0"):
        compose(["router=tempered", "router.temperature=0"])
    with pytest.raises(ConfigErrors, match="E-CONFIG-242"):
        compose(["run.packages=[no_such_package]"])
    assert packages.allowed() == ("my_moe",)             # a mistyped name is not remembered


@pytest.mark.parametrize("line, base", [
    ("from moetrain.routers.topk import TopKRouter", "TopKRouter"),
    ("from moetrain.routers.topk import TopKRouter as Base", "Base"),
    ("from moetrain.routers import topk", "topk.TopKRouter"),
    ("import moetrain.routers.topk", "moetrain.routers.topk.TopKRouter"),
    ("import moetrain.routers.topk as routing", "routing.TopKRouter"),
    ("from .near import Near", "Near"),
    ("from . import near", "near.Near"),
    ("from ..near import Far", "Far"),
])
def test_a_base_class_is_found_however_it_is_imported(line: str, base: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "written/inside"
    inside.mkdir(parents=True)
    (tmp_path / "written/__init__.py").write_text("")
    (inside / "__init__.py").write_text("from .part import Part\n")
    for folder, name in ((inside, "Near"), (tmp_path / "written", "Far")):
        (folder / "near.py").write_text(
            f"from moetrain.routers.topk import TopKRouter\nclass {name}(TopKRouter): ...\n")
    (inside / "part.py").write_text(f"{line}\nclass Part({base}): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    packages.allow("written")
    assert "scale" in arguments("written.inside.part.Part", "router")
    with pytest.raises(NoSuchPart, match="imports written.inside.part.Part"):
        arguments("written.inside.Part", "router")
