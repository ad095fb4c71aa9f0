"""A key that is typed and not read is an error; what experiments and yaml files set is not."""

import shlex
from typing import Any, Literal, get_args, get_origin

import pytest

from moetrain.config import readers
from moetrain.config.compose import compose, for_run, idle_overrides, run_dir, to_yaml
from moetrain.config.groups import group_options
from moetrain.config.overrides import sweep
from moetrain.config.readers import ALWAYS, READ_WITH
from moetrain.config.values import Key, schema_keys
from moetrain.errors import ConfigErrors

# What makes an option of a group complete, and what stands in the way of a condition.
COMPANIONS = {"data=tokens": ["data.path=shards"], "data=megatron": ["data.path=prefix"],
              "data=memmap": ["data.path=train.bin"],
              "engine=deepspeed": ["parallel=ep", "run.nproc=2", "optim=adamw"],
              "router.num_groups=2": ["router.topk_groups=1"],
              "model.attention=sliced": ["model.num_kv_heads=4"]}
OTHERS = {"data.mixture": "proportional"}                  # data=synthetic writes the other one itself
PART_KEYS = {
    "router.hidden": "8", "router.dropout": "0.5",
    "router.topk_groups": "2", "router.group_score": "top2", "router.counts": "micro",
    "router.center": "false",
    "planner": "hecate", "planner.horizon": "7", "planner.state_ratio": "6", "planner.tolerance": "0.5",
    "hardware": "h100",
    "balance.weight": "0.5", "balance.mode": "sync", "balance.drift": "0.5", "balance.reduction": "sum",
    "loss.micro_balance.mode": "sync", "loss.micro_balance.drift": "0.5",
}
BESIDE_ADVICE = {"parallel.ep": ["run.nproc=2"], "parallel.shard": ["run.nproc=2"],
                 "parallel.max_sliced_experts": ["optim=adamw"]}
BESIDE = {"router.hidden": ["router=mlp"], "router.dropout": ["router=mlp"],
          "router.counts": ["router=sigmoid"], "router.center": ["router=sigmoid"],
          "loss.micro_balance.mode": ["loss=[micro_balance]", "balance=none"],
          "loss.micro_balance.drift": ["loss=[micro_balance]", "balance=none"]}


def refused(*overrides: str) -> list[str]:
    """The errors' ids and the overrides that they are about."""
    with pytest.raises(ConfigErrors) as caught:
        compose(overrides)
    return [f"{error.id} {error.where}" for error in caught.value.errors]


def test_the_table_knows_every_key() -> None:
    """A new key is written in one of the two: in READ_WITH with what reads it, or in ALWAYS."""
    keys, table = set(schema_keys()), {key for key in READ_WITH if "*" not in key}
    assert keys - table - ALWAYS == set(), "write the key in config/readers.py"
    assert ALWAYS <= keys and not ALWAYS & table
    for conditions in READ_WITH.values():
        for condition in conditions:
            name, sign, wanted = readers.parts(condition)
            options = group_options().get(name)
            assert sign == ">" or options is None or set(wanted.split("|")) <= set(options)


def another(key: Key) -> str:
    """A value that is not the default, as it is typed."""
    if key.path == "data.encoding":
        return "cp1252"
    if get_origin(key.type) is dict:
        return "{code: 2}"
    if get_origin(key.type) is list:
        return "[elsewhere]"
    kind = next((member for member in get_args(key.type) if member is not type(None)), key.type) \
        if get_origin(key.type) is not Literal else key.type
    if get_origin(kind) is Literal:
        return str(next(choice for choice in get_args(kind) if choice != key.default))
    values: dict[Any, Any] = {bool: str(not key.default).lower(), str: "elsewhere",
                              int: 2 + (key.default == 2),
                              float: 0.5 + 0.25 * (key.default == 0.5)}
    return str(values[kind])


def preventing(condition: str) -> str:
    """An override under which the condition does not hold."""
    name, sign, wanted = readers.parts(condition)
    if sign in (">", "!="):
        return f"{name}={wanted}"
    others = {"balance": "none", "data": "synthetic" if "synthetic" not in wanted else "text",
              "log.wandb": "off",
              "parallel": "single", "schedule": "none", "engine": "torch", "optim": "adamw",
              "optim.schedule": "cosine",
              "parallel.forecast": "trend", "model.block": "plain",
              "model.attention": "plain", "router.balance": "quantile", "router.kind": "linear"}
    return f"{name}={others.get(name, 'exact' if name.endswith('.mode') else 'micro')}"


def meeting(condition: str) -> list[str]:
    typed = readers.to_type(condition)
    return [typed, *COMPANIONS.get(typed, [])]


CASES = [(key, OTHERS.get(key) or another(record)) for key,
         record in schema_keys().items() if key in READ_WITH] + list(PART_KEYS.items())


@pytest.mark.parametrize("key, value", CASES)
def test_every_key_that_is_not_read_is_refused_and_the_advice_works(key: str, value: str) -> None:
    conditions = readers.conditions(key)
    assert conditions, key
    typed = f"{key}={value}"
    for unmet in conditions:
        around = [word for condition in conditions if condition != unmet for word in meeting(condition)]
        command = [*BESIDE.get(key, []), *around, preventing(unmet), typed]
        with pytest.raises(ConfigErrors) as caught:
            compose(command)
        assert {error.id for error in caught.value.errors} == {"E-CONFIG-100"}
        error = next(error for error in caught.value.errors if f'"{typed}"' in error.where)
        assert readers.key_of(unmet) in error.why
        advised = shlex.split(error.next.partition(", or leave")[0])
        compose([*command, *advised, *BESIDE_ADVICE.get(key, []),
                 *(word for condition in conditions for word in meeting(condition)[1:])])


def test_what_nobody_typed_is_not_refused() -> None:
    compose(["experiment=quickstart", "data=synthetic"])
    compose(["experiment=quickstart",
             "optim.name=adamw"])         # conf/optim/muon.yaml's muon_lr has no reader now


@pytest.mark.parametrize("override",
                         ["parallel.ep=null", "parallel.max_copies=2", "planner=balanced",
                          "balance.scope=none",
                          "~optim.muon_lr",
                                      "data.path=null", "hardware=cpu", "data.num_domains=4", "parallel.ep=1",
                          "parallel.max_copies=0", "planner=ep"])
def test_what_changes_nothing_may_be_typed(override: str) -> None:
    compose([override])


def test_one_mistake_is_said_once() -> None:
    assert refused("parallel.rematerialize=true", "optim.lrr=1") == [
        'E-CONFIG-003 override "optim.lrr=1" on the command line',
        'E-CONFIG-100 override "parallel.rematerialize=true" on the command line']
    assert [line[:12] for line in refused("parallel=fsddp", "parallel.max_copies=3")] == ["E-CONFIG-002"]


def test_a_verb_about_a_run_takes_what_the_run_reads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = compose(["run.name=demo", "parallel=fssdp", "planner=hecate", "parallel.max_copies=3",
                       "optim=muon",
                       "optim.muon_lr=0.5",
                       "optim.schedule=cosine"])
    run_dir(trained).mkdir(parents=True)
    (run_dir(trained) / "config.yaml").write_text(to_yaml(trained))
    for_run(["run.name=demo", "parallel.max_copies=3", "planner=hecate", "optim.muon_lr=0.5",
             "data=synthetic",
             "data.num_domains=2"])
    with pytest.raises(ConfigErrors) as caught:
        for_run(["run.name=demo", "data.num_domains=2", "optim.decay=0.25"])
    assert [error.what for error in caught.value.errors] == [
        "data.num_domains=2 has no effect", "optim.decay=0.25 has no effect"]


@pytest.mark.parametrize("typed",
                         ["parallel.max_copies=4", "parallel.ep=2", "planner=eplb", "optim.lr=5",
                          "optim.muon_lr=0.25", "balance.weight=0.5",
                                   "balance=micro", "loss=[z]", "model.dim=32"])
def test_a_verb_about_a_run_refuses_what_it_reads_only_in_training(
        typed: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value than the run's would change nothing, in silence."""
    monkeypatch.chdir(tmp_path)
    trained = compose(["run.name=demo", "parallel=fssdp", "planner=hecate", "parallel.max_copies=3",
                       "optim=muon",
                       "optim.muon_lr=0.5"])
    run_dir(trained).mkdir(parents=True)
    (run_dir(trained) / "config.yaml").write_text(to_yaml(trained))
    with pytest.raises(ConfigErrors) as caught:
        for_run(["demo", typed])
    assert {error.id for error in caught.value.errors} <= {"E-CONFIG-016", "E-CONFIG-100"}
    assert all(word in str(caught.value.errors[0]) for word in ("leave", "trained"))


def test_a_job_of_a_sweep_leaves_out_what_it_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = sweep(["optim=adamw,muon", "optim.muon_lr=0.5"])
    assert [idle_overrides(job) for job in jobs] == [{"optim.muon_lr=0.5"}, set()]
    from moetrain.config.sweep import _without_idle

    assert _without_idle(jobs) == [["optim=adamw"], ["optim=muon", "optim.muon_lr=0.5"]]
    nobody = sweep(["run.seed=1,2", "optim.muon_lr=0.5"])
    assert _without_idle(nobody) == nobody
