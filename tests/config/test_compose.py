"""Composing: every option of conf/ works, every mistake is named, and all of them together."""

import shutil
from pathlib import Path

import pytest
import yaml

from moetrain.config import compose as module
from moetrain.config.compose import (
    compose,
    config_dir,
    for_run,
    from_yaml,
    run_dir,
    to_yaml,
)
from moetrain.config.groups import group_options, section_of, written_by
from moetrain.config.overrides import sweep
from moetrain.config.resumed import resume_conflicts
from moetrain.config.schema import Config
from moetrain.config.values import as_tree, flatten, schema_keys, show
from moetrain.errors import ConfigError, ConfigErrors

OPTIONS = [(group, option) for group, options in group_options().items() for option in options]
# What an option needs beside itself.
COMPANIONS = {("data", "tokens"): ["data.path=shards"], ("data", "megatron"): ["data.path=prefix"],
              ("data", "memmap"): ["data.path=train.bin"],
              ("loss", "l1_lb"): ["router=relu"], ("loss", "load"): ["router.noise=vmoe"],
              ("engine", "deepspeed"): ["parallel=ep", "run.nproc=2", "optim=adamw"],
              **{(group, option): ["parallel=fssdp"] for group,
                 option in OPTIONS if group in ("planner", "hardware")}}


def errors_of(*overrides: str) -> list[ConfigError]:
    with pytest.raises(ConfigErrors) as caught:
        compose(overrides)
    return list(caught.value.errors)


def ids_of(*overrides: str) -> list[str]:
    return [error.id for error in errors_of(*overrides)]


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    assert isinstance(compose([f"{group}={option}", *COMPANIONS.get((group, option), [])]), Config)


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_key_in_yaml_has_a_comment(group: str, option: str) -> None:
    lines = (config_dir() / group / f"{option}.yaml").read_text().splitlines()
    for line in lines:
        head = line.split("#")[0].strip()
        if head and not head.endswith(":"):
            assert "#" in line, line


def test_yaml_and_schema_have_the_same_defaults() -> None:
    composed, bare = flatten(compose([])), flatten(Config())
    for path in schema_keys():
        assert composed[path] == bare[path], path


def test_quickstart_is_the_measured_setting() -> None:
    config = compose(["experiment=quickstart"])
    assert (config.run.name, config.run.steps, config.train.global_batch,
            config.train.seq_len) == ("quickstart", 800, 16, 128)
    assert (config.model.dim, config.model.expert_dim, config.model.num_experts) == (128, 128, 8)
    assert (config.optim.name, config.optim.schedule, config.optim.lr,
            config.optim.muon_lr) == ("muon", "wsd", 3e-3, 6e-3)
    assert (config.data.mixture, config.eval.interval) == ("uniform", 500)
    compose(["experiment=quickstart", "parallel=ep", "run.nproc=2"])


def test_ones_own_text_is_trained_with_the_measured_setting() -> None:
    """By default: what is learned is all that differs from the quickstart."""
    own, measured = (flatten(compose(words)) for words in (["data.path=/my/text"], ["experiment=quickstart"]))
    different = {path for path in own if own[path] != measured[path]}
    assert different == {"run.name", "data.path", "data.mixture", "eval.interval", "eval.windows",
                         "log.interval"}


def test_debug_stays_tiny() -> None:
    config = compose(["experiment=debug"])
    assert (config.model.dim, config.run.steps, config.optim.name, config.optim.lr) == (64, 20, "adamw", 1e-3)


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose(["model=quickstart", "run.steps=7", "experiment=debug"])
    assert (config.model.dim, config.run.steps, config.data.kind,
            config.log.wandb) == (128, 7, "synthetic", "off")


@pytest.mark.parametrize("experiment", group_options()["experiment"])
def test_a_typed_option_of_every_group_wins_over_every_experiment(experiment: str) -> None:
    """Its section is that of its file, whole, in whichever order they are typed."""
    typed = {group: options[-1] for group, options in group_options().items() if group != "experiment"}
    for choices in ({**typed, "experiment": experiment}, {"experiment": experiment, **typed}):
        values, _ = module._compose_yaml(choices)
        for group, option in typed.items():
            written = written_by(group, option)[section_of(group)]
            assert values[section_of(group)] == written, (experiment, group, option)


@pytest.mark.parametrize("words, expected", [
    ([], ("SigmoidRouter", 2.5)),
    (["router.scale=1"], ("SigmoidRouter", 1.0)),
    (["router=topk"], ("TopKRouter", 1.0)),
    (["experiment=olmoe_8xh100"], ("SigmoidRouter", 2.5)),
    (["experiment=olmoe_8xh100", "router=topk"], ("TopKRouter", 1.0)),
], ids=str)
def test_a_public_model_brings_its_router_and_what_is_typed_wins(words: list[str], expected: tuple) -> None:
    for typed in (["model=deepseek_v3", *words], [*words, "model=deepseek_v3"]):
        router = compose([*typed, "run.nproc=1", "parallel=single", "data.path=x"]).router
        assert (router["_target_"].rpartition(".")[2], router["scale"]) == expected


def test_a_typed_option_leaves_the_rest_of_the_experiment() -> None:
    config = compose(["experiment=debug", "logging=wandb"])
    assert (config.log.wandb, config.run.steps, config.data.kind) == ("online", 20, "synthetic")
    assert compose(["logging=console", "experiment=debug"]).log.wandb == "auto"
    assert compose(["experiment=quickstart", "data.weights={code: 2}"]).data.mixture == "uniform"
    assert compose(["experiment=quickstart", "data=text",
                    "data.weights={code: 2}"]).data.mixture == "proportional"


@pytest.mark.parametrize("group", group_options())
def test_nothing_is_no_option_but_for_groups_that_may_be_empty(group: str) -> None:
    for words in ([f"{group}=null"], [f"~{group}"]):
        if group in ("experiment", "loss"):
            assert compose(words) == compose([])
        else:
            error, *rest = errors_of(*words)
            assert not rest and group_options()[group][0] in error.next


def test_every_default_may_be_typed() -> None:
    assert compose([f"{path}={show(key.default) if key.default != '' else ''}" for path,
                    key in schema_keys().items()]) == compose([])


def test_values_of_every_kind() -> None:
    config = compose(["optim.lr=1", "model.num_experts=[8,4]", "model.top_k=[2,1]", "router.weights=raw",
                      "run.dir=null",
                      "~optim.warmup", "+eval.batch=4", "++eval.windows=5", "model={dim: 96}",
                      "optim.eps=${model.norm_eps}",
                      "log.wandb=off", "loss=[z]", "loss.z.weight=0.5"])
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.model.num_experts == [8, 4] and config.model.dim == 96
    assert (config.optim.warmup, config.eval.batch, config.eval.windows, config.optim.eps) == (50, 4, 5, 1e-6)
    assert config.router == {**compose([]).router, "weights": "raw"}
    assert config.loss["z"]["weight"] == 0.5 and config.log.wandb == "off" and config.run.dir is None


@pytest.mark.parametrize("text",
                         ["Hello, world", "f(x) = {y: [", "007", "1e3", "null", "", "it's \"quoted\""])
def test_free_text_needs_no_quotes(text: str) -> None:
    assert compose([f"generate.prompt={text}"]).generate.prompt == text


def test_all_mistakes_are_reported_together() -> None:
    found = errors_of("optim.lrr=1", "model=deubg", "run.steps=abc", "run.dtype=float16", "debug",
                      "balance.wieght=1",
                      "router._target_=os.system", "parallel=ep", "run.nproc=3", "train.micro_batch=5")
    assert sorted(error.id[-3:] for error in found) == ["001", "002", "003", "004", "005", "008", "009",
                                                        "035"]
    for error in found:
        assert all([error.what, error.where, error.why, error.next])


@pytest.mark.parametrize("override, id, suggestion", [
    ("optim.lrr=1", "003", "optim.lr (float, default 0.003): peak learning rate"),
    ("lr=1", "003", "optim.lr"),
    ("optimizer.lr=1", "003", "optim.lr"),
    ("optim.learning_rate=1", "003", "optim.lr"),
    ("nproc=1", "003", "run.nproc"),
    ("modle=debug", "003", "model=<option>"),
    ("model.dim.x=1", "041", "model.dim=<value>"),
    ("router.weight=raw", "009", "router.weights"),
    ("router.top_k=4", "010", "model.top_k=4"),
    ("loss.z.weight=1", "007", "loss=[z]"),
    ("loss=[y]", "002", "loss=[z]|loss=z"),
    ("experiment=debgu", "002", "experiment=debug"),
    ("parallel=fsdpp", "002", "parallel"),
    ("model=[debug]", "014", "debug"),
    ("~model", "040", "debug"),
    ("log=off", "006", "logging"),
    ("router=1", "002", "choose router from"),
    ("optim.lr=fast", "004", "optim.lr=0.003"),
    ("run.steps=true", "004", "run.steps=800"),
    ("run.steps=1e3", "004", "run.steps=1000"),
    ("optim.betas=[a,b]", "004", "optim.betas=[0.9,0.95]"),
    ("optim.betas=0.9", "004", "optim.betas=[0.9,0.95]"),
    ("train.frozen=embed", "004", "train.frozen=[embed]"),
    ("balance.weight=heavy", "004", "balance.weight=0.01"),
    ("balance.scope=gloabl", "005", "balance.scope=global"), ("balance.scope=null", "004", "balance.scope"),
    ("balance.mode=exakt", "005", "balance.mode=exact"), ("balance.mode=null", "004", "balance.mode"),
    ("run.device=cdua", "005", "run.device=cuda"),
    ("quickstart", "001", "experiment=quickstart"),
    ("optim.lr=(", "001", "quote"),
    ("model@other=debug", "001", "model@other"),
    ("--fast", "019", "moetrain train --help"),
    ("run.seed=1,2", "012", "--multirun"),
    ("optim.lr=${oc.env:HOME}", "013", "optim.lr="),
    ("optim.lr=${no.such}", "013", "optim.lr="),
    ("router._target_=moetrain.losses.load_balance.torch", "008", "choose router from"),
    ("router._target_=os.system", "008", "choose router from"),
    ("router._target_=moetrain.routers.topc.TopKRouter", "008", "choose router from"),
])
def test_a_mistake_has_its_number_and_says_what_to_type(override: str, id: str, suggestion: str) -> None:
    error, *rest = errors_of(override)
    assert error.id == f"E-CONFIG-{id}" and not rest
    assert any(part in error.next for part in suggestion.split("|")), error.next
    assert id == "019" or f'"{override}"' in error.where


def test_a_rule_names_the_override_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors_of("run.nproc=3", "parallel=ddp")[0].where == 'override "run.nproc=3" on the command line'
    folder = tmp_path / "conf"
    for file in config_dir().rglob("*.yaml"):
        copy = folder / file.relative_to(config_dir())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace("global_batch: 8 ", "micro_batch: 5 "))
    for place in ("compose", "groups", "origins"):
        monkeypatch.setattr(f"moetrain.config.{place}.config_dir", lambda: folder)
    assert errors_of("experiment=debug")[0].where.endswith("train.micro_batch in conf/experiment/debug.yaml")


def test_a_wrong_key_does_not_bring_a_wrong_rule() -> None:
    assert ids_of("model.num_expert=64", "model.top_k=16") == ["E-CONFIG-003"]


def test_a_config_survives_its_yaml(tmp_path: Path) -> None:
    config = compose(["experiment=quickstart", "loss=[z]", "optim.eps=1e-12", "model.num_experts=[4,8]",
                      "generate.prompt=ä: #1"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text, id",
                         [("[1, 2]", "017"), ("a: [", "017"), ("run: {nmae: x}", "003"),
                          ("run: {steps: many}", "004"),
                                      ("!!python/object/apply:os.getcwd []", "017")])
def test_a_damaged_config_of_a_run_is_a_config_error(tmp_path: Path, text: str, id: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigErrors) as caught:
        from_yaml(tmp_path / "config.yaml")
    assert caught.value.id == f"E-CONFIG-{id}" and "config.yaml" in caught.value.errors[0].where


def test_resume_may_change_how_but_not_what() -> None:
    old = compose(["experiment=quickstart"])
    free = compose(["experiment=quickstart", "run.steps=2000", "run.stop_at=1500", "run.nproc=2",
                    "parallel=ep", "log.interval=5",
                    "checkpoint.interval=7", "eval.interval=1", "run.timeout_s=9", "train.micro_batch=2",
                    "data.cache=x",
                    "generate.tokens=3", "run.device=cpu", "run.dir=elsewhere"])
    assert resume_conflicts(old, free) == []
    centered, as_it_was = (compose(["router=sigmoid", *more]) for more in ([], ["router.center=false"]))
    assert centered.router["center"]  # runs of earlier releases were not
    assert resume_conflicts(as_it_was, centered) == []
    new = compose(["experiment=quickstart", "model.dim=64", "run.seed=1", "run.dtype=float64",
                   "train.global_batch=8",
                   "train.seq_len=64", "optim.lr=1", "data.mixture=proportional", "balance=micro",
                   "router.weights=raw", "loss=[z]"])
    refused = {error.where: error for error in resume_conflicts(old, new)}
    assert refused.keys() == {"model.dim", "run.seed", "run.dtype", "train.global_batch", "train.seq_len",
                              "optim.lr", "data.mixture",
                              "balance.scope", "router.weights", "loss"}
    assert "128" in refused["model.dim"].what and "64" in refused["model.dim"].what


def test_another_part_is_one_conflict_and_the_advice_goes_on_with_the_first() -> None:
    old = compose(["experiment=debug", "router=recurrent", "expert=gpt_oss"])
    conflicts = resume_conflicts(old, compose(["experiment=debug", "router=cosine"]))
    assert [error.where for error in conflicts] == ["router._target_", "expert._target_"]
    advised = [error.next.partition(",")[0] for error in conflicts]
    assert advised == ["router=recurrent", "expert=gpt_oss"]
    assert resume_conflicts(old, compose(["experiment=debug", *advised])) == []


def test_a_sweep_over_seeds_sees_the_same_generated_data(tmp_path: Path) -> None:
    assert [compose(["data=synthetic", f"run.seed={seed}"]).data_seed for seed in (1, 2)] == [0, 0]
    assert compose(["run.seed=3"]).data_seed == 3 and compose(["run.seed=3", "data.seed=1"]).data_seed == 1
    assert compose(["data=synthetic", "data.seed=null", "run.seed=3"]).data_seed == 3


def test_a_run_from_before_there_was_a_seed_of_the_data_keeps_its_own(tmp_path: Path) -> None:
    for seed in (0, 3):
        now = compose(["experiment=debug", f"run.seed={seed}"])
        tree = as_tree(now)
        del tree["data"]["seed"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        old = from_yaml(tmp_path / "config.yaml")
        assert old.data_seed == seed
        conflicts = resume_conflicts(old, now)
        assert [error.where for error in conflicts] == ([] if seed == 0 else ["data.seed"])
        for error in conflicts:
            again = compose(["experiment=debug", f"run.seed={seed}", error.next.partition(",")[0]])
            assert resume_conflicts(old, again) == []


def conf_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> Path:
    """A copy of conf/ with further files of losses."""
    shutil.copytree(config_dir(), tmp_path / "conf")
    for name, text in files.items():
        (tmp_path / "conf" / "loss" / f"{name}.yaml").write_text(text)
    for place in ("compose", "groups", "origins"):
        monkeypatch.setattr(f"moetrain.config.{place}.config_dir", lambda: tmp_path / "conf")
    return tmp_path / "conf"


@pytest.mark.parametrize("text, line, what", [
    ("# entropy\n\nentropy_loss:\n  _target_: moetrain.losses.z.ZLoss\n", "line 3", "entropy_loss"),
    ("entropy:\n  _target_: moetrain.losses.z.ZLoss\n   weight: 1\n", "line 3", "cannot be read"),
    ("entropy:\n  weight: [1\n", "line 3", "cannot be read"), ("- a\n", "entropy.yaml", "cannot be read")])
def test_a_broken_file_of_conf_is_named_with_its_line(text: str, line: str, what: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    conf_with(tmp_path, monkeypatch, entropy=text)
    error, *rest = errors_of("loss=[entropy]")
    assert not rest and what in error.what and "loss/entropy.yaml" in error.where
    assert line in f"{error.where} {error.why}"


def test_a_run_is_found_and_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = compose(["run.name=demo", "model=quickstart", "parallel=ep", "run.nproc=2",
                       "train.micro_batch=8"])
    run_dir(trained).mkdir(parents=True)
    (run_dir(trained) / "config.yaml").write_text(to_yaml(trained))

    config = for_run(["run.name=demo", "generate.tokens=5", "data=synthetic"])
    assert (config.model, config.generate.tokens, config.data.kind) == (trained.model, 5, "synthetic")
    assert (config.run.nproc, config.parallel.mode, run_dir(config)) == (1, "single", Path("runs/demo"))
    assert run_dir(for_run([f"run.dir={tmp_path}/runs/demo"])) == tmp_path / "runs/demo"

    for overrides, id, text in [(["run.name=dmeo"], "015", "demo"),
                                (["run.name=demo", "generate.tokns=5"], "003", "generate.tokens"),
                                (["run.name=demo", "model.dim=64"], "016", "leave model.dim out"),
                                (["run.name=demo", "model=debug"], "016", "leave model out")]:
        with pytest.raises(ConfigErrors) as caught:
            for_run(overrides)
        assert caught.value.id == f"E-CONFIG-{id}" and text in caught.value.errors[0].next


def test_an_experiment_finds_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["experiment=debug", "run.steps=3"])
    run_dir(config).mkdir(parents=True)
    (run_dir(config) / "config.yaml").write_text(to_yaml(config))
    assert as_tree(for_run(["experiment=debug"])) == as_tree(config)


def test_a_sweep_is_every_combination() -> None:
    assert sweep(["router=topk", "run.seed=1,2", "optim.lr=range(1,3)"]) == [
        ["router=topk", "run.seed=1", "optim.lr=1"], ["router=topk", "run.seed=1", "optim.lr=2"],
        ["router=topk", "run.seed=2", "optim.lr=1"], ["router=topk", "run.seed=2", "optim.lr=2"]]


def test_conf_is_found_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_dir().name == "conf" and module.config_dir is config_dir
    (tmp_path / "moetrain" / "conf").mkdir(parents=True)
    (tmp_path / "moetrain" / "conf" / "config.yaml").touch()
    monkeypatch.setattr("moetrain.config.groups.moetrain.__file__",
                        str(tmp_path / "moetrain" / "__init__.py"))
    assert config_dir() == tmp_path / "moetrain" / "conf"


def test_yaml_names_only_keys_of_the_schema() -> None:
    known = {path.partition(".")[2] for path in schema_keys() if path.startswith("model.")}
    for option in group_options()["model"]:
        assert written_by("model", option)["model"].keys() <= known
