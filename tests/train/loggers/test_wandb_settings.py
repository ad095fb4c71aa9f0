"""Which of config and WANDB_* variables decides, and what the banner says of it."""

from pathlib import Path

import pytest

from moetrain.config.compose import compose
from moetrain.config.sweep import _tracker_group
from moetrain.train.loggers.wandb_settings import WandbSettings, wandb_line, wandb_settings

ENVIRONMENT = {"WANDB_MODE": "online", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team",
               "WANDB_NAME": "night", "WANDB_RUN_GROUP": "sweep",
               "WANDB_TAGS": "a, b", "WANDB_NOTES": "why", "WANDB_DIR": "/elsewhere"}
KEYS = ["log.wandb=offline", "log.wandb_project=mine", "log.wandb_entity=me", "log.wandb_name=day",
        "log.wandb_group=g", "log.wandb_tags=[c]", "log.wandb_notes=because"]


def test_without_anything_it_writes_files_under_the_name_of_the_run() -> None:
    assert (wandb_settings(compose(["run.name=x"]), {})
            == WandbSettings("offline", "moetrain", "x", None, None, (), None))


def test_a_variable_stands_in_for_a_key_that_is_null_and_a_key_wins() -> None:
    assert (wandb_settings(compose([]), ENVIRONMENT)
            == WandbSettings("online", "theirs", "night", "team", "sweep", ("a", "b"), "why"))
    assert (wandb_settings(compose(KEYS), ENVIRONMENT)
            == WandbSettings("offline", "mine", "day", "me", "g", ("c",), "because"))


@pytest.mark.parametrize("environment, mode", [
    ({"WANDB_MODE": "disabled"}, None), ({"WANDB_DISABLED": "true"}, None),
    ({"WANDB_MODE": "dryrun"}, "offline"), ({"WANDB_MODE": "nonsense"}, "offline")])
def test_modes_of_the_variables(environment: dict[str, str], mode: str | None) -> None:
    found = wandb_settings(compose([]), environment)
    assert (found and found.mode) == mode


def test_a_debug_run_does_not_start_it() -> None:
    assert wandb_settings(compose(["experiment=debug"]), {}) is None
    assert wandb_settings(compose(["experiment=debug"]), ENVIRONMENT) is None


def test_the_banner_says_where_it_writes_and_how_to_send_it(tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "x"
    assert wandb_line(None, directory) == ""
    assert wandb_line(wandb_settings(compose([]), {}), directory) == (
        "offline, project moetrain, files in runs/x/wandb; "
        "to send them: wandb sync runs/x/wandb/offline-run-*")
    assert (wandb_line(wandb_settings(compose([]), ENVIRONMENT), directory)
            == "online, project team/theirs, group sweep, files in runs/x/wandb")


def test_a_sweep_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert _tracker_group(compose(["run.name=x"])) == ["log.wandb_group=x"]
    assert (_tracker_group(compose(["experiment=debug"])) == _tracker_group(compose(["log.wandb_group=y"]))
            == [])
    monkeypatch.setenv("WANDB_RUN_GROUP", "z")
    assert _tracker_group(compose([])) == []
