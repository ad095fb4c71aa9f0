"""Settings of Weights & Biases: the keys `log.wandb*`, and the WANDB_* variables where a key is null.

A key with a value takes precedence over its variable. `log.wandb=auto` takes the mode of WANDB_MODE (or
WANDB_DISABLED), and without these only writes files. The folder is always the run's own, and so is the id,
with which a resumed run continues its curves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moetrain.config.schema import Config
from moetrain.files import nearby, shown

DEFAULT_PROJECT = "moetrain"
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}


class WandbSettings(NamedTuple):
    """Arguments of `wandb.init`."""

    mode: str  # online or offline
    project: str
    name: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    notes: str | None


def wandb_settings(config: Config, environment: Mapping[str, str]) -> WandbSettings | None:
    """Combine config and environment variables; None where Weights & Biases is off."""
    log = config.log
    mode = log.wandb if log.wandb != "auto" else _mode_of(environment)
    if mode == "off":
        return None
    named = [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",")]
    return WandbSettings(
        mode=mode,
        project=log.wandb_project or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        name=log.wandb_name or environment.get("WANDB_NAME") or config.run.name,
        entity=log.wandb_entity or environment.get("WANDB_ENTITY") or None,
        group=log.wandb_group or environment.get("WANDB_RUN_GROUP") or None,
        tags=tuple(log.wandb_tags) or tuple(filter(None, named)),
        notes=log.wandb_notes or environment.get("WANDB_NOTES") or None,
    )


def _mode_of(environment: Mapping[str, str]) -> str:
    if environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "off"
    return _MODES.get(environment.get("WANDB_MODE", "").lower(), "offline")


def wandb_line(settings: WandbSettings | None, directory: Path) -> str:
    """Describe for the banner where it writes and how to upload that; empty where it is off."""
    if settings is None:
        return ""
    project = f"{settings.entity}/{settings.project}" if settings.entity else settings.project
    group = f", group {settings.group}" if settings.group else ""
    folder = f"{nearby(directory)}/wandb"
    if settings.mode == "online":
        return shown(f"online, project {project}{group}, files in {folder}")
    return shown(f"offline, project {project}{group}, files in {folder}; "
                 f"to send them: wandb sync {folder}/offline-run-*")
