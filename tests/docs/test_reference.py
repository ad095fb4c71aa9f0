"""The reference agrees with the code: keys, metrics, files, records, verbs, errors; its examples run."""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest

from moetrain import errors
from moetrain.__main__ import VERBS
from moetrain.checkpoint.manifest import read_manifest
from moetrain.cli.help import keys_of
from moetrain.comm.mesh import DENSE_AXES, DERIVED, EXPERT_AXES, build_mesh, mesh_sizes
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.config.values import schema_keys, schema_sections
from moetrain.model.build import weights_on_meta
from tests.support.any_router import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
CLASSES = {cls.__name__: cls for cls in vars(errors).values() if isinstance(cls, type)
           and issubclass(cls, errors.MoETrainError) and cls is not errors.ConfigErrors}


def section(page: str, heading: str) -> str:
    """The text below a heading, down to the next one of the same or a higher rank."""
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,6}} |\Z)", PAGES[page],
                      re.MULTILINE | re.DOTALL)
    assert found, (page, heading)
    return found[2]


def rows(text: str) -> list[list[str]]:
    """Rows of the tables in a text, without heads."""
    lines = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {index for index, row in enumerate(cells) if set("".join(row)) <= set("- ")}
    return [row for index, row in enumerate(cells) if index not in heads and index + 1 not in heads]


def names(text: str) -> list[str]:
    """What stands in backticks in the first column."""
    return [name for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])]


def pattern(name: str) -> re.Pattern[str]:
    """A documented name as a pattern: <domain> and the like, L, E, M, N, *, … stand for something."""
    text = re.sub("<(?!domain)[a-z]+>", r"\\w+", re.escape(name))
    for written, meant in (("<domain>", r"(?!mean$)\w+"), (r"\*", r"[^/]+"), ("…", r".+"),
                          ("NNNNNNNN", r"\d{8}")):
        text = text.replace(written, meant)
    return re.compile(re.sub(r"(?<=[.-])[LEMN](?=\\\.|$)", r"\\d+", text))


def moetrain(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "moetrain", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that has everything: a dense layer, shared experts, sources."""
    directory = tmp_path_factory.mktemp("run") / "run"
    moetrain(ROOT, "train", "experiment=debug", "run.steps=2", f"run.dir={directory}", "log.sources=true",
             "log.router_dump=true", "log.routing=true", "log.timeline=1", "loss=[z]",
             "model.first_dense_layers=1", "model.num_shared_experts=1", "model.qk_norm=head",
             "model.norm=layer", "model.head_bias=true", "model.attention_bias=all",
             "model.attention_sinks=true")
    return directory


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- files.md


def test_metrics_are_those_documented(run_dir: Path) -> None:
    """Metrics without an entry under `in` are in every record, in the page's order; others have a row too."""
    always, sometimes = [], []
    for name, _, where, _ in rows(section("files", "metrics.jsonl")):
        (sometimes if where else always).append(name.strip("`"))
    for record in lines(run_dir / "metrics.jsonl"):
        assert [name for name in record if name in always] == always
        for name in set(record) - set(always):
            assert any(pattern(place).fullmatch(name) for place in sometimes), name


def test_evaluations_are_those_documented(run_dir: Path) -> None:
    documented = names(section("files", "eval.jsonl"))
    (record,) = lines(run_dir / "eval.jsonl")
    for name in documented:                                  # its text is generated: nobody knows bytes
        assert any(pattern(name).fullmatch(key) for key in record) != name.startswith("nats_per_byte/"), name
    for key in record:
        assert sum(bool(pattern(name).fullmatch(key)) for name in documented) == 1, key


def test_loads_are_those_documented(run_dir: Path) -> None:
    documented = {row[0].strip("`"): (row[1], row[2]) for row in rows(section("files", "loads.npz"))}
    with np.load(run_dir / "loads.npz") as found:
        del documented["choices"]                        # only where some choices are no experts
        assert set(found) == set(documented)
        for name, (shape, kind) in documented.items():
            assert found[name].ndim == shape.count(",") + 1, name
            assert found[name].dtype == np.int64 if kind == "int64" else found[name].dtype.kind == "U", name


def test_small_files_have_the_documented_keys(run_dir: Path) -> None:
    assert list(json.loads((run_dir / "env.json").read_text())) == names(section("files", "env.json"))
    status = json.loads((run_dir / "status.json").read_text())
    assert list(status) == names(section("commands", "status.json"))
    assert status == {"code": 0, "reason": "done", "step": 2}


def test_every_file_of_a_run_is_documented(run_dir: Path) -> None:
    documented = names(section("files", "A run"))
    found = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()]
    for name in found:
        assert any(pattern(place).match(name) if place.endswith("/") else pattern(place).fullmatch(name)
                   for place in documented), name
    other_runs = {"log/rank-N.log", "data/", "huggingface/", "wandb/", "wandb/id", "report/timeline.csv",
                  "log/routing/step-NNNNNNNN.<fingerprint>.npz", "transform.json"}
    keys = {"log.wandb=off", "data.cache", "log.router_dump=true", "log.timeline", "log.timeline_start"}
    for place in set(documented) - other_runs - keys:
        assert any(pattern(place).match(name) for name in found), place


def test_checkpoints_are_as_documented(run_dir: Path) -> None:
    (directory,) = (run_dir / "checkpoints").iterdir()
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "rank-0000.safetensors"]
    manifest = json.loads((directory / "manifest.json").read_bytes().partition(b"\n")[2])
    assert list(manifest) == names(section("files", "manifest.json"))
    for part in ("facts", "values"):
        assert all(f"`{key}`" in section("files", "manifest.json") for key in manifest[part])
    documented = [row[0].strip("`") for row in rows(section("files", "Tensors"))]
    found = set(read_manifest(directory).names())
    models = {name for name in found if name.startswith("model.")}
    for name in models:
        assert any(pattern(place).fullmatch(name) for place in documented), name
    for place in documented:
        assert any(pattern(place).fullmatch(name) for name in models), place
    moments = {f"optim.{name.removeprefix('model.')}.{moment}"
               for name in models for moment in ("exp_avg", "exp_avg_sq")}
    assert found == models | moments


def test_tensors_of_architectures_are_as_documented() -> None:
    documented = names(section("files", "Tensors by architecture"))
    always = {place.strip("`") for place, *_ in rows(section("files", "Tensors"))}
    found = {name for overrides in ARCHITECTURES.values()
             for name in weights_on_meta(compose(list(overrides)), 100)}
    for name in found:
        assert any(pattern(place).fullmatch(name) for place in (*always, *documented)), name
    for place in documented:
        assert any(pattern(place).fullmatch(name) for name in found), place


def test_prepared_data_is_as_documented(tmp_path: Path) -> None:
    from moetrain.data.preparation.prepare import prepare

    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 200)
    folder = prepare(path=str(tmp_path / "text"), out=tmp_path / "data", tokenizer="bytes", domain_cap=None)
    description = json.loads((folder / "dataset.json").read_text())
    assert list(description) == names(section("files", "dataset.json"))
    assert folder.name == description["fingerprint"][:16] and (folder.parent / "sources.json").is_file()
    content = (folder / "train-00000.tokens").read_bytes()
    magic, version, length, _ = struct.unpack_from("<8sIII", content)
    header = json.loads(content[20:20 + length])
    assert (magic, version) == (b"MOETOKEN", 1)
    assert list(header) == [row[0].strip("`") for row in rows(section("files", ".tokens"))[6:]]
    per_document, per_token = 8 + 4, 2
    assert len(content) == (20 + length + 8 + per_document * header["documents"]
                            + per_token * header["tokens"])


# --- config.md


def test_the_page_of_keys_is_the_generated_one() -> None:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "tools" / "write_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert PAGES["config"] == tool.page(), "run tools/write_reference.py"


def test_every_key_on_any_page_exists() -> None:
    """Words like `section.key` in backticks, with or without a value."""
    known = {*schema_keys(), *(key.path for section in schema_sections() for key in keys_of(section)),
             *(f"{part}._target_" for part in ("router", "expert", "balance", "capacity", "planner"))}
    sections = {key.partition(".")[0] for key in known}
    for page, text in PAGES.items():
        code = " ".join(re.findall(r"`[^`\n]+`", text))
        for key in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+)(?:=[^\s`]*)?(?=[`\s])", code):
            tensor_or_file = ("model.embed", "model.head", "config.yaml", "eval.jsonl")
            if key.partition(".")[0] in sections and key not in tensor_or_file:
                assert key in known, (page, key)


# --- commands.md


def test_verbs_and_exit_codes_are_those_documented() -> None:
    assert names(section("commands", "Verbs")) == list(VERBS)
    documented = {int(code) for code in names(section("commands", "Exit codes"))}
    assert documented == {0, 130, *(cls.code for cls in CLASSES.values())}
    scripts = sorted(f"launch/{path.name}" for path in (ROOT / "launch").glob("*.s*h"))
    assert sorted(names(section("commands", "Scripts"))) == scripts


# --- records.md


@pytest.mark.parametrize("where", [
    "routers.base.RouterContext", "routers.edits.RoutingEdits", "routers.base.Routing",
    "routers.base.RoutingStats", "losses.base.Pooled", "data.batches.batch.Batch",
    "plan.placement.LayerPlacement", "plan.placement.ExpertPlacement"])
def test_records_have_the_documented_fields(where: str) -> None:
    module, _, name = where.rpartition(".")
    record = getattr(importlib.import_module(f"moetrain.{module}"), name)
    actual = [field.name for field in fields(record)] if is_dataclass(record) else list(record._fields)
    assert names(section("records", name)) == actual


def test_the_mesh_is_as_documented() -> None:
    import torch

    views, modes, groups = [], {}, []
    for row in rows(section("records", "Mesh")):
        first = row[0].strip("`")
        if first in ("dense", "expert"):
            views.append(tuple(re.findall(r"`(\w+)`", row[1])))
        elif first in group_options()["parallel"] and first not in modes:
            modes[first] = set(re.findall(r"`(\w+)`", row[1]))
        else:
            groups.append(first)
    assert views == [DENSE_AXES, EXPERT_AXES]
    assert set(groups) == {*DERIVED, "node", "ep_node", "ep_rail"}
    assert set(groups) == set(build_mesh({}, torch.device("cpu")).groups)
    assert modes["single"] == set()
    for mode in ("ddp", "ep", "fsdp", "ep_fsdp"):
        sizes = mesh_sizes(mode, 16, 4 if "ep" in mode else None, 8 if "fsdp" in mode else None)
        assert {name for name in modes[mode] if name not in ("shard", "ep")} == {
            axis for axis, size in sizes.items() if size > 1 and axis != "ep"}, mode


@pytest.mark.slow
def test_the_examples_of_a_router_and_a_loss_train(tmp_path: Path) -> None:
    """The code of the page, laid into a copy of the package."""
    shutil.copytree(ROOT / "moetrain", tmp_path / "moetrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    blocks = re.findall(r"`([\w/.]+)`[^`]*\n\n```(?:python|yaml)\n(.*?)```", PAGES["records"], re.DOTALL)
    assert [name for name, _ in blocks] == ["moetrain/routers/softplus.py", "conf/router/softplus.yaml",
                                            "moetrain/moe/squared_relu.py", "conf/expert/squared_relu.yaml",
                                            "moetrain/losses/sureness.py", "conf/loss/sureness.yaml",
                                            "moetrain/moe/last_capacity.py", "conf/capacity/last.yaml",
                                            "moetrain/plan/planners/hottest.py",
                                            "conf/planner/hottest.yaml"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    moetrain(tmp_path, "train", "experiment=debug", "run.steps=1", "router=softplus", "router.scale=2.5",
             "expert=squared_relu", "loss=[z,sureness]", "capacity=last", "parallel=fssdp", "run.nproc=2",
             "planner=hottest")
    (metrics,) = lines(tmp_path / "runs/debug/metrics.jsonl")
    assert {"loss/z", "loss/sureness", "loss/weighted/sureness"} <= set(metrics)
    assert "factor of the gate weights" in " ".join(moetrain(tmp_path, "train", "--help", "router").split())


# --- errors.md


def raised() -> Iterator[tuple[str, int, str, str]]:
    """Class, number, what and place of every error that the package can raise.

    A function that hands its number on (`damaged` of data/tokens/blocks.py) counts where it is called.
    """
    trees = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text())
             for path in (ROOT / "moetrain").rglob("*.py")}
    wrappers: dict[tuple[str, str], str] = {}
    for module, tree in trees.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for call in ast.walk(function):
                    if error_class(call) and isinstance(call.args[0], ast.Name):
                        taken = [argument.arg for argument in function.args.args]
                        assert call.args[0].id in taken, (module, call.lineno)
                        wrappers[module, function.name] = error_class(call)
    for module, tree in trees.items():
        origin = {alias.asname or alias.name: (node.module, alias.name) for node in ast.walk(tree)
                  if isinstance(node, ast.ImportFrom) for alias in node.names}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
            cls = (error_class(call) or wrappers.get((module, name))
                   or wrappers.get(origin.get(name, ("", ""))))
            if cls and not (error_class(call) and isinstance(call.args[0], ast.Name)):
                numbers = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
                assert numbers and all(type(number) is int for number in numbers), (module, call.lineno)
                texts = [argument for argument in call.args[1:]
                         if isinstance(argument, (ast.Constant, ast.JoinedStr))]
                what = ast.unparse(texts[0]) if texts else ""
                yield from ((cls, number, what, f"{module}:{call.lineno}") for number in numbers)


def error_class(node: ast.AST) -> str | None:
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    return name if name in CLASSES else None


def test_every_code_that_is_raised_is_documented_and_no_other() -> None:
    actual = {(cls, f"E-{CLASSES[cls].area}-{number:03d}") for cls, number, _, _ in raised()}
    documented, heading = [], ""
    for line in PAGES["errors"].splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if found := re.match(r"\| `(E-[A-Z]+-\d{3})` \|", line):
            documented.append((heading, found[1]))
    assert len(documented) == len(set(documented))
    assert set(documented) == actual


def test_classes_have_the_documented_exit_code() -> None:
    used = {cls for cls, _, _, _ in raised()}
    assert used <= set(CLASSES)
    for name in used:
        assert re.match(rf"\nExit code {CLASSES[name].code}\.", section("errors", name)), name
    assert used == set(CLASSES) - {"MoETrainError"}


def test_codes_that_several_places_share_are_known() -> None:
    """Two messages under one code are meant here."""
    shared: dict[str, set[str]] = {}
    for cls, number, what, _ in raised():
        if what:
            shared.setdefault(f"E-{CLASSES[cls].area}-{number:03d}", set()).add(what)
    assert {code for code, texts in shared.items() if len(texts) > 1} <= {
        "E-CONFIG-001", "E-CONFIG-019", "E-CONFIG-042", "E-CONFIG-305",  # one mistake, found in two places
        "E-CONFIG-318", "E-CONFIG-319", "E-CHECKPOINT-038",
        "E-CONFIG-322", "E-CHECKPOINT-024", "E-CHECKPOINT-029", "E-CHECKPOINT-030", "E-CHECKPOINT-040",
        "E-DATA-005", "E-DATA-006",                          # header and index; too short and too long
    }


# --- links


def test_links_between_pages_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\((\w+)\.md(?:#([\w-]+))?\)", text):
            headings = re.findall(r"^#+ (.+)$", PAGES[target], re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, (page, target, anchor)
