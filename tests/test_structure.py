"""Structure of the repository: order of imports, tests that mirror the package, files that come together.

Sources are parsed, never imported, so imports inside functions and under TYPE_CHECKING count as well. Every
check is a function of sources or names that returns what is wrong, and is tried on something wrong.
"""

import ast
import re
from collections.abc import Iterable, Mapping

import pytest

from moetrain.config.build import FAMILIES
from tests.support.package_source import (
    PACKAGE,
    ROOT,
    classes,
    imported_names,
    imports,
    load_package,
    nodes,
    package,
    paths_below,
)

# --- imports

# Each for one purpose, imported by cli/ alone.
APPLICATIONS = ("upcycle", "peft", "compress", "interop", "analysis", "profiling", "report", "doctor")
# From the ground up. A module imports from lines above its own, or from its own package.
ORDER = (
    ("files", "locks", "machine", "shapes", "streams", "units"),
    ("errors",),
    ("packages", "user_code"),
    ("ops", "plan", "config", "checkpoint"),
    ("comm", "routers", "data", "runs"),
    ("losses", "moe"),
    ("parallel",),
    ("model",),
    ("generate", "train", "transform"),
    APPLICATIONS,
    ("launch",),
    ("check",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line}
LEVEL[""] = len(ORDER)                       # moetrain/__init__.py, which offers `allow`
# What a package must not import although it lies above: process groups, the config, those who decide for it.
UNKNOWN_TO = {
    "ops": ("torch.distributed",),
    "plan": ("torch.distributed", "moetrain.config"),
    "routers": ("torch.distributed", "moetrain.config"),
    "losses": ("torch.distributed", "moetrain.comm", "moetrain.config"),
    "moe": ("torch.distributed", "moetrain.config", "moetrain.losses", "moetrain.plan.planners"),
    "parallel": ("moetrain.config", "moetrain.routers", "moetrain.losses"),
    "model": ("moetrain.losses", "moetrain.data"),
    "launch": ("moetrain.train", "moetrain.model"),
}
# Packages without torch, so that verbs which only look at files start at once.
NO_TORCH = ("checkpoint", "runs", "config")


def upward_imports(sources: Mapping[str, str]) -> list[str]:
    """Imports of a package that does not lie above the module's own."""
    return sorted({f"{module} imports {target}" for module, target in imports(sources)
                   if package(target) and package(target) != package(module)
                   and LEVEL[package(target)] >= LEVEL.get(package(module), -1)})


def import_loop(sources: Mapping[str, str]) -> list[str] | None:
    """Modules that import each other in a circle, or None."""
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


def forbidden_knowledge(sources: Mapping[str, str]) -> list[str]:
    """Imports of a name that UNKNOWN_TO keeps from the module's package."""
    return [f"{module} imports {name}" for module, source in sources.items()
            for name in imported_names(module, source) for unknown in UNKNOWN_TO.get(package(module), ())
            if f"{name}.".startswith(f"{unknown}.")]


def with_torch(sources: Mapping[str, str]) -> set[str]:
    """Modules that import torch, themselves or by what they import."""
    found = {module for module, source in sources.items()
             if any(name.split(".")[0] == "torch" for name in imported_names(module, source))}
    edges = [(module, target) for module, target in imports(sources) if module != target]
    while more := {module for module, target in edges if target in found} - found:
        found |= more
    return found


def test_every_package_has_its_line() -> None:
    assert {package(module) for module in PACKAGE} - {""} <= set(LEVEL)


def test_imports_only_go_down() -> None:
    assert upward_imports(PACKAGE) == []


def test_there_are_no_import_loops() -> None:
    assert import_loop(PACKAGE) is None


def test_packages_do_not_know_what_is_none_of_their_business() -> None:
    assert forbidden_knowledge(PACKAGE) == []


def test_applications_are_imported_by_cli_alone() -> None:
    assert [f"{module} imports {target}" for module, target in imports(PACKAGE)
            if package(target) in APPLICATIONS and package(module) not in ("cli", package(target))] == []


def test_the_format_of_saves_and_the_files_of_runs_need_no_torch() -> None:
    assert [module for module in sorted(with_torch(PACKAGE)) if package(module) in NO_TORCH] == []


@pytest.mark.parametrize("source", [
    "import moetrain.train.loop", "from moetrain.train.loop import train", "from moetrain.train import loop",
    "from moetrain import train", "from ..train import loop", "from ..train.loop import train as t",
    "def f():\n    from moetrain.train.loop import train",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moetrain.train.loop as loop",
])
def test_an_import_upwards_is_found_however_it_is_written(source: str) -> None:
    sources = {"moetrain.__init__": "", "moetrain.train.__init__": "", "moetrain.train.loop": "",
               "moetrain.ops.gating": source}
    assert len(upward_imports(sources)) == 1


def test_an_import_of_a_neighbour_and_a_loop_are_found() -> None:
    assert upward_imports({"moetrain.ops.a": "import moetrain.plan.b", "moetrain.plan.b": ""})
    sources = {"moetrain.ops.a": "from moetrain.ops import b",
               "moetrain.ops.b": "def f():\n    from . import c",
               "moetrain.ops.c": "from .a import x", "moetrain.ops.__init__": ""}
    assert upward_imports(sources) == []
    assert import_loop(sources) == ["moetrain.ops.a", "moetrain.ops.b", "moetrain.ops.c", "moetrain.ops.a"]


@pytest.mark.parametrize("module, source", [
    ("moetrain.ops.a", "import torch.distributed as dist"),
    ("moetrain.ops.a", "from torch import distributed"),
    ("moetrain.moe.a", "from moetrain.plan.planners.base import Planner"),
    ("moetrain.parallel.a", "def f():\n    from moetrain.config.schema import Config"),
])
def test_an_import_of_what_a_package_must_not_know_is_found(module: str, source: str) -> None:
    assert len(forbidden_knowledge({module: source})) == 1


def test_an_import_of_torch_is_found_where_it_hides() -> None:
    sources = {"moetrain.runs.a": "from moetrain.ops import b",
               "moetrain.ops.b": "def f():\n    from torch import nn", "moetrain.runs.c": ""}
    assert with_torch(sources) == {"moetrain.runs.a", "moetrain.ops.b"}


# --- tests

# Modules without a test of their path, by the test that covers them.
COVERS = {
    "check/test_router": "check/findings",
    "checkpoint/test_commit": "checkpoint/disk",
    "checkpoint/test_payload": "checkpoint/{records,verify} train/checkpoint/snapshot",
    "cli/test_check": "check/part",
    "cli/test_checkpoint": "cli/{inspect,progress,table}",
    "cli/test_export": "cli/import_folder report/model_card "
                       "interop/huggingface/{export_files,logits_check,run_export,run_import}",
    "cli/test_main": "__main__ cli/{help,train,version}",
    "cli/test_run_names": "config/run_names",
    "cli/test_slurm": "launch/{slurm_node,slurm_options}",
    "comm/exchange/test_backends": "comm/exchange/{base,deepep,two_level,vdev}",
    "comm/exchange/test_flat": "comm/exchange/async_exchange",
    "comm/exchange/test_peer": "comm/exchange/shared_buffers",
    "comm/sparse/test_forms": "comm/sparse/{base,packed,two_level} ops/pinned",
    "comm/test_device": "machine",
    "comm/test_reduce": "comm/agreement",
    "config/test_bounds": "config/rules/ranges",
    "config/test_checks": "config/rules/{attention,data,losses,model,optim,parallel,paths} "
                          "config/rules/{latent_attention,multi_token,rotary,routers,run,train,wording}",
    "config/test_compose": "config/{groups,key,origins,overrides,parallel_schema,resumed,schema,tree,values} "
                           "errors",
    "config/test_sizes": "config/architecture",
    "config/test_text_and_paths": "config/sweep",
    "data/account/test_ledgers": "data/account/text",
    "data/corpus/test_scan": "data/corpus/own_output",
    "data/corpus/test_split": "data/reading/{documents,spool}",
    "data/preparation/test_dataset_folder": "data/preparation/split_writer",
    "data/preparation/test_prepare": "data/corpus/{builtin,selection} data/preparation/prepared_dataset",
    "data/pretokenized/test_memmap": "data/pretokenized/{account,memmap_files,token_files}",
    "data/reading/test_compressed": "data/reading/text_blocks",
    "data/reading/test_formats": "data/reading/{json_records,parquet,reader,records,table_records,text_file}",
    "data/test_corpora": "cli/data",
    "data/test_inspection": "cli/corpus_report",
    "data/test_loader": "data/batches/{batch,synthetic}",
    "data/test_token_inspection": "cli/token_report",
    "data/tokenizers/test_long_text": "data/tokenizers/tokenizer_json",
    "data/tokens/test_index_file": "data/tokens/index",
    "integration/test_balance_invariants": "train/count_pool",
    "integration/test_balance_pipelines": "losses/attached",
    "integration/test_classic_bugs": "parallel/{data_parallel,grad_norm} train/step",
    "integration/test_command_line": "cli/report",
    "integration/test_fsdp": "model/parallelize parallel/fsdp",
    "integration/test_fssdp": "parallel/fssdp/{copies,transfers} train/fssdp_setup",
    "integration/test_fssdp_state": "parallel/fssdp/replanner",
    "integration/test_parity": "model/transformer train/micro_batches",
    "integration/test_recipes": "config/recipes",
    "integration/test_restart": "comm/failures launch/agent",
    "integration/test_resume": "train/{loop,setup,start}",
    "integration/test_step_metrics": "train/metrics",
    "integration/test_timeline": "train/loggers/timeline",
    "interop/huggingface/test_families": "interop/huggingface/{layer_names,router_rules,semantics} "
                                         "interop/huggingface/families/{base,deepseek_v2,deepseek_v3,glm4_moe,gpt_oss,"
                                         "granitemoe,mixtral,olmoe,phimoe,qwen2_moe,qwen3_moe,registry}",
    "interop/dcp/test_folder": "interop/dcp/records",
    "interop/huggingface/test_folder": "interop/huggingface/{folder_writer,shard_file}",
    "interop/huggingface/test_importing": "interop/huggingface/exporting",
    "interop/test_megatron": "interop/megatron_index",
    "launch/test_local": "launch/{rank,status}",
    "launch/test_nodes": "launch/__main__",
    "launch/test_supervisor": "launch/ranks_of_agent",
    "losses/test_load_balance": "losses/base",
    "losses/test_pooled_slopes": "losses/{hetero_lbl,l1_lb,null_lbl}",
    "losses/test_scoped": "losses/{first_choice,importance,load}",
    "model/test_residual": "model/architecture",
    "model/test_rotary": "config/rope_scaling",
    "moe/test_dispatch": "moe/{dispatch_records,experts} ops/host_read",
    "moe/test_clamped_swiglu": "ops/clamped_swiglu",
    "moe/test_expert_form": "moe/normalized_expert",
    "moe/test_layer": "moe/wrappers",
    "plan/cost/test_link_traffic": "plan/cost/machine",
    "plan/loads/test_forecast": "plan/loads/synthetic",
    "plan/splitting/test_split": "plan/cost/step_time plan/splitting/water_filling",
    "plan/test_planner_properties": "plan/splitting/rules",
    "plan/test_planners": "plan/leveling/{locality,overflow,rehoming} "
                          "plan/planners/{balanced,base,ep,eplb,hecate,laer,llep,shadow}",
    "report/test_loads": "report/{arrays,run}",
    "report/test_loss": "report/output",
    "report/test_routing_pictures": "report/routing",
    "report/test_specialization": "runs/specialization",
    "routers/test_properties": "routers/base",
    "runs/test_lock": "locks",
    "tools/test_build_cuda": "ops/extension",
    "tools/test_check_parity": "check/training",
    "train/optim/test_optimizer": "train/optim/lr_schedule",
    "train/test_data_setup": "data/preparation/by_fingerprint",
    "train/evaluation/test_evaluate_run": "train/evaluation/periodic",
    "train/test_objective": "routers/stack",
    "train/test_save_times": "train/checkpoint/periodic train/loggers/banner",
}


def mirror_faults(modules: Iterable[str], tests: Iterable[str], covers: Mapping[str, str]) -> list[str]:
    """What is wrong between modules and tests, both as paths below their folder, without `.py`."""
    modules, tests = set(modules), set(tests)
    own = {module for module in modules if _test_of(module) in tests}
    listed = [(test, module) for test, text in covers.items() for module in _expand(text)]
    named = [module for _, module in listed]
    return [
        *(f"moetrain/{module}.py has no test" for module in sorted(modules - own - set(named))),
        *(f"{test} is not there" for test in covers if test not in tests),
        *(f"{test} covers {module}, which is not there" for test, module in listed if module not in modules),
        *(f"{test} covers {module}, which has its own test" for test, module in listed if module in own),
        *(f"{module} is listed twice" for module in sorted(set(named)) if named.count(module) > 1),
    ]


def _expand(text: str) -> list[str]:
    """Words of a text, as bash expands their braces: moe/{bank,layer} -> moe/bank, moe/layer."""
    words = [word.partition("{") for word in text.split()]
    return [start + name for start, _, names in words for name in names.rstrip("}").split(",")]


def _test_of(module: str) -> str:
    """plan/assign -> plan/test_assign."""
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


def imports_of_tests(sources: Mapping[str, str]) -> list[str]:
    """Imports of a test, or of something in one. What tests share is in tests/support."""
    return [f"{module} imports {name}" for module, source in sources.items()
            for name in imported_names(module, source) if re.search(r"(^|\.)test_", name)]


def test_tests_mirror_the_package() -> None:
    assert mirror_faults(paths_below(ROOT / "moetrain"), paths_below(ROOT / "tests"), COVERS) == []


@pytest.mark.parametrize("tests, covers, fault", [
    (["test_a"], {}, "moetrain/ops/b.py has no test"),
    (["test_a"], {"ops/test_b": "ops/b"}, "ops/test_b is not there"),
    (["test_a", "ops/test_b"], {"test_a": "ops/c"}, "test_a covers ops/c, which is not there"),
    (["test_a", "ops/test_b"], {"test_a": "ops/b"}, "test_a covers ops/b, which has its own test"),
    (["test_a", "test_c"], {"test_a": "ops/b", "test_c": "ops/b"}, "ops/b is listed twice"),
])
def test_a_hole_in_the_mirror_is_found(tests: list[str], covers: dict[str, str], fault: str) -> None:
    assert fault in mirror_faults(["a", "ops/b"], tests, covers)
    assert mirror_faults(["a", "ops/b"], ["test_a", "ops/test_b"], {}) == []


def test_no_test_imports_a_test() -> None:
    assert imports_of_tests(load_package("tests")) == []


@pytest.mark.parametrize("source", [
    "from tests.ops.test_swiglu import case", "from tests.ops import test_swiglu",
    "import tests.ops.test_swiglu", "from .test_swiglu import case",
])
def test_an_import_of_a_test_is_found(source: str) -> None:
    assert len(imports_of_tests({"tests.ops.test_b": source})) == 1


# --- pairs

# Groups whose files are numbers for code that other groups choose.
NUMBERS = ("denoising", "experiment", "hardware", "logging", "model")


def op_faults(kernels: Iterable[str], ops: Mapping[str, str], tests: Iterable[str]) -> list[str]:
    """What is missing of csrc/<op>.cu, moetrain/ops/<op>.py (by source) and tests/ops/test_<op>.py."""
    kernels, tests = set(kernels), set(tests)
    asking = {op for op, source in ops.items()
              if "moetrain.ops.extension.kernels_for" in imported_names(f"moetrain.ops.{op}", source)}
    untested = {op for op in kernels if f"test_{op}" not in tests}
    return [*(f"csrc/{op}.cu without moetrain/ops/{op}.py" for op in sorted(kernels - set(ops))),
            *(f"csrc/{op}.cu without tests/ops/test_{op}.py" for op in sorted(untested)),
            *(f"moetrain/ops/{op}.py asks for kernels without csrc/{op}.cu" for op in asking - kernels)]


def conf_faults(files: Mapping[str, str], sources: Mapping[str, str], tests: str) -> list[str]:
    """What is missing of conf/<group>/<value>.yaml, the code that it names, and a test of it.

    A yaml names a class by `_target_`, or a value that the code compares with (`optim=muon`). Its test, in
    the one text `tests`, imports the class or says `group=value`, as `files` name the yaml.
    """
    words = {node.value for source in sources.values() for node in nodes(source)
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    said, faults = set(re.findall(r"\w+", tests)), []
    for option, text in files.items():
        group, value = option.split("=")
        if target := re.search(r"^ *_target_: (\S+)\.(\w+)", text, re.MULTILINE):
            module, name = target.groups()
            if name not in classes(sources.get(module, "")):
                faults.append(f"{option}: {module} has no class {name}")
            tested = name in said or option in tests
        elif group in NUMBERS:
            continue
        else:
            if value not in words:
                faults.append(f"{option}: nothing in moetrain/ knows {value}")
            tested = option in tests
        if not tested:
            faults.append(f"{option}: no test names it")
    return faults


def parts_without_yaml(files: Mapping[str, str], sources: Mapping[str, str]) -> list[str]:
    """Classes of a family (a router, a loss, a planner) that no yaml names and no other class inherits."""
    bases = {name: {base.id for base in node.bases if isinstance(base, ast.Name)}
             for source in sources.values() for name, node in classes(source).items()}
    heads = {family.base.rpartition(".")[2] for family in FAMILIES.values()}

    def descends(name: str) -> bool:
        return any(base in heads or descends(base) for base in bases.get(name, ()))

    targets = {name for text in files.values() for name in re.findall(r"_target_: \S+\.(\w+)", text)}
    inherited = {base for found in bases.values() for base in found}
    return sorted(name for name in bases if descends(name) and name not in targets | inherited)


def conf_files() -> dict[str, str]:
    """Texts of conf/<group>/<value>.yaml by `group=value`."""
    return {f"{path.parent.name}={path.stem}": path.read_text(encoding="utf-8")
            for path in sorted((ROOT / "conf").glob("*/*.yaml"))}


def test_kernel_reference_and_test_come_together() -> None:
    ops = {module.split(".")[-1]: source for module, source in PACKAGE.items() if package(module) == "ops"}
    kernels = [path.stem for path in (ROOT / "csrc").glob("*.cu")]
    assert op_faults(kernels, ops, paths_below(ROOT / "tests" / "ops")) == []


def test_yaml_code_and_test_come_together() -> None:
    tests = [source for module, source in load_package("tests").items() if module != __name__]
    assert conf_faults(conf_files(), PACKAGE, "\n".join(tests)) == []
    # Those of model.attention=sliced and =experts
    assert parts_without_yaml(conf_files(), PACKAGE) == ["HeadSlice", "QueryOutputExpert"]


@pytest.mark.parametrize("kernels, tests, fault", [
    ([], ["test_a", "test_b"], "moetrain/ops/a.py asks for kernels without csrc/a.cu"),
    (["a"], ["test_b"], "csrc/a.cu without tests/ops/test_a.py"),
    (["a", "c"], ["test_a"], "csrc/c.cu without moetrain/ops/c.py"),
])
def test_an_op_that_lacks_a_part_is_found(kernels: list[str], tests: list[str], fault: str) -> None:
    ops = {"a": "from moetrain.ops.extension import define, kernels_for", "b": ""}
    assert fault in op_faults(kernels, ops, tests)
    assert op_faults(["a"], ops, ["test_a"]) == []


@pytest.mark.parametrize("option, text, fault", [
    ("router=b", "_target_: moetrain.routers.b.B", "router=b: moetrain.routers.b has no class B"),
    ("router=b", "_target_: moetrain.routers.a.B", "router=b: moetrain.routers.a has no class B"),
    ("router=c", "_target_: moetrain.routers.a.C", "router=c: no test names it"),
    ("optim=lion", "name: lion", "optim=lion: nothing in moetrain/ knows lion"),
    ("optim=sgd", "name: sgd", "optim=sgd: no test names it"),
])
def test_a_yaml_without_code_or_test_is_found(option: str, text: str, fault: str) -> None:
    sources = {"moetrain.routers.a": "class A(Router):\n    pass\nclass C(A):\n    pass",
               "moetrain.train.optim": "name in ('muon', 'sgd')"}
    sound = {"router=a": "_target_: moetrain.routers.a.A", "optim=muon": "name: muon", "model=any": "dim: 3"}
    assert conf_faults(sound, sources, "from moetrain.routers.a import A\ncompose(['optim=muon'])") == []
    assert fault in conf_faults({**sound, option: text}, sources, "router=b optim=lion A")
    assert parts_without_yaml(sound, sources) == ["C"]
