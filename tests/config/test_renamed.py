"""Old names of keys: refused where somebody types them, read as the new ones where a run recorded them."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from moetrain.__main__ import main
from moetrain.checkpoint.manifest import read_manifest
from moetrain.config import build, renamed
from moetrain.config.build import FAMILIES, Family
from moetrain.config.compose import compose, for_run, from_yaml
from moetrain.config.groups import config_dir
from moetrain.config.resumed import resume_conflicts
from moetrain.config.sweep import sweep_jobs
from moetrain.config.values import flatten
from moetrain.errors import ConfigErrors
from moetrain.runs.completion import config_of, trained_config

# Written by the release with the old names: tests/support/old_run.
OLD_RUN = Path(__file__).parents[1] / "support" / "old_run"
# As that run was started, in the names of today.
OF_THE_RUN = ["experiment=debug", "log.wandb=off", "log.progress=false", "run.name=old", "run.steps=4",
              "run.stop_at=2", "parallel=fssdp", "parallel.max_copies=1", "parallel.max_forecast_error=0.2",
              "parallel.max_sliced_experts=1", "parallel.rehome_interval=2", "optim=adamw", "optim.warmup=1",
              "train.aux_loss=injected", "router=sigmoid", "router.center=false",
              "balance.normalization=huggingface", "loss=[micro_balance]",
              "loss.micro_balance.normalization=megatron", "checkpoint.async_save=false", "run.dtype=float64",
              "model.dim=16", "model.num_layers=1", "model.num_experts=4", "model.expert_dim=8",
              "model.num_heads=2", "model.num_kv_heads=1", "data=synthetic", "data.vocab_size=32",
              "train.seq_len=16", "train.global_batch=4"]
FSSDP, SIGMOID, LOSS = ["parallel=fssdp"], ["router=sigmoid"], ["loss=[micro_balance]"]
TYPED = [
    (FSSDP, "parallel.room=4", "parallel.max_copies=4"),
    (FSSDP, "+parallel.room=4", "parallel.max_copies=4"),
    (FSSDP, "parallel={room: 4}", "parallel.max_copies=4"),
    (FSSDP, "~parallel.room", "~parallel.max_copies"),
    (FSSDP, "parallel.fallback=150", "parallel.max_forecast_error=0.15"),
    (FSSDP, "parallel.fallback=0", "parallel.max_forecast_error=0"),
    (FSSDP, "parallel.fallback=1000", "parallel.max_forecast_error=1"),
    ([*FSSDP, "optim=adamw"], "parallel.sliced=2", "parallel.max_sliced_experts=2"),
    ([], "train.loss_carrier=returned", "train.aux_loss=added"),
    ([], "train.loss_carrier=attached", "train.aux_loss=injected"),
    (SIGMOID, "router.centre=false", "router.center=false"),
    ([], "router.centre=false", "router=sigmoid router.center=false"),
    ([], "balance.normalisation=huggingface", "balance.normalization=huggingface"),
    (LOSS, "loss.micro_balance.normalisation=one", "loss.micro_balance.normalization=one"),
]


@pytest.mark.parametrize("beside, old, new", TYPED)
def test_an_old_key_is_answered_with_what_to_type(beside: list[str], old: str, new: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        compose([*beside, old])
    (error,) = caught.value.errors
    assert error.id == "E-CONFIG-055" and error.next == new and f'"{old}"' in error.where
    compose([*beside, *new.split()])


def test_every_old_key_is_typed_above_and_every_new_one_exists() -> None:
    old = {path for path in flatten(from_old_names()) if renamed.renaming(path)}
    keys = ("parallel.room", "parallel.fallback", "parallel.sliced", "train.loss_carrier", "router.centre",
            "balance.normalisation", "loss.micro_balance.normalisation")
    assert not old and all(any(key in text for _, text, _ in TYPED) for key in keys)
    assert {renamed.new_path(key) for key in keys} <= set(flatten(from_old_names()))
    assert renamed.renaming("parallel.max_copies") is None and renamed.new_path("optim.lr") == "optim.lr"


def test_all_mistakes_are_told_at_once_and_the_exit_code_is_2(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "parallel=fssdp", "parallel.room=4", "parallel.fallback=150", "optim.lrr=1"]) == 2
    said = capsys.readouterr().err
    assert [line[:12] for line in said.splitlines() if line.startswith("E-")] == [
        "E-CONFIG-055", "E-CONFIG-055", "E-CONFIG-003"]
    assert main(["train", "--help", "parallel.room"]) == 2
    assert "moetrain train --help parallel.max_copies" in capsys.readouterr().err


def test_a_sweep_over_an_old_key_is_one_mistake() -> None:
    with pytest.raises(ConfigErrors) as caught:
        sweep_jobs(["experiment=debug", "parallel=fssdp", "parallel.room=1,2", "parallel.fallback=100,150",
                    "train.loss_carrier=returned,attached", "optim.lrr=1"])
    assert [error.next for error in caught.value.errors][:3] == [
        "parallel.max_copies=1,2", "parallel.max_forecast_error=0.1,0.15", "train.aux_loss=added,injected"]
    assert [error.id for error in caught.value.errors][3:] == ["E-CONFIG-003"]


def test_an_old_key_in_a_yaml_file_is_answered_with_the_file(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for file in config_dir().rglob("*.yaml"):
        copy = tmp_path / "conf" / file.relative_to(config_dir())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nparallel:\n  fallback: 30\nbalance:\n  normalisation: megatron\n")
    for place in ("compose", "groups", "origins"):
        monkeypatch.setattr(f"moetrain.config.{place}.config_dir", lambda: tmp_path / "conf")
    with pytest.raises(ConfigErrors) as caught:
        compose(["experiment=mine"])
    assert {(error.id, error.next) for error in caught.value.errors} == {
        ("E-CONFIG-055", "parallel.max_forecast_error=0.03"),
        ("E-CONFIG-055", "balance.normalization=megatron")}
    assert all("experiment/mine.yaml" in error.where for error in caught.value.errors)


# --- what a run recorded


def from_old_names():
    return from_yaml(OLD_RUN / "config.yaml")


def test_a_recorded_config_is_read_as_if_it_had_the_new_names() -> None:
    new = compose(OF_THE_RUN)
    (checkpoint,) = (OLD_RUN / "checkpoints").iterdir()
    readers = {"config.yaml": from_old_names(), "resume": trained_config(OLD_RUN, checkpoint),
               "manifest": config_of(read_manifest(checkpoint), checkpoint)}
    for name, old in readers.items():
        assert asdict(old) == asdict(new), name
        assert resume_conflicts(old, new) == [] == resume_conflicts(new, old), name
    assert for_run([f"run.dir={OLD_RUN}"]).router == new.router


def test_what_may_change_on_resume_may_change_for_an_old_run() -> None:
    free = ["parallel.max_copies=2", "parallel.max_forecast_error=0.3", "parallel.max_sliced_experts=0",
            "train.aux_loss=added", "router.center=true"]
    assert resume_conflicts(from_old_names(), compose([*OF_THE_RUN, *free])) == []
    changed = compose([*OF_THE_RUN, "balance.normalization=one"])
    (error,) = resume_conflicts(from_old_names(), changed)
    assert error.where == "balance.normalization"
    assert error.next.startswith("balance.normalization=huggingface")


def test_a_record_with_both_names_is_refused(tmp_path: Path) -> None:
    tree = yaml.safe_load((OLD_RUN / "config.yaml").read_text())
    tree["parallel"]["max_copies"] = 7
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigErrors, match="unknown key parallel.room"):
        from_yaml(tmp_path / "config.yaml")


def test_a_part_that_has_an_argument_of_the_old_name_keeps_it(tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts.py").write_text("class Mine:\n    def __init__(self, centre: bool = True): ...\n")
    monkeypatch.setattr(build, "_PACKAGE", tmp_path)
    mine = Family("moetrain.parts", "moetrain.parts.Mine")
    monkeypatch.setattr(build, "FAMILIES", {**FAMILIES, "router": mine})
    node = {"_target_": "moetrain.parts.Mine", "centre": False}
    given = {"router": node, "run": None, "expert": {}, "language_loss": {}}
    assert renamed.translate(given) == given


@pytest.mark.parametrize("recorded, now", [(False, "none"), (True, "head")])
def test_norms_of_queries_and_keys_that_were_switched_are_those_of_each_head(recorded, now):
    values = asdict(compose(["experiment=debug"]))
    values["model"]["qk_norm"] = recorded
    assert renamed.translate(values)["model"]["qk_norm"] == now
