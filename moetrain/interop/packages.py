"""Checks for optional packages, made before a process group or a file exists. Imports no torch."""

import importlib.util

from moetrain.config.schema import Config
from moetrain.errors import ConfigError


def check_installed(config: Config) -> None:
    """Check that the optional packages of a config are installed; ConfigError says what to install."""
    if config.engine.name == "deepspeed":
        require("deepspeed", extra="deepspeed", key="engine=deepspeed")
        require("ninja", extra="deepspeed", key="engine=deepspeed")  # DeepSpeed compiles at its first use
    if config.data.kind == "megatron":
        require("megatron.core", extra="megatron", key="data=megatron")


def require(package: str, *, extra: str, key: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: name to import it by.
        extra: extra of moetrain that installs it.
        key: config key that needs it, for the error.
    """
    if not _installed(package):
        raise ConfigError(
            69, f"{package} is not installed", where=key,
            why=f"{key} runs on it, and the extra {extra} brings it",
            next=f"pip install 'moetrain[{extra}]', or in a checkout: pip install -e '.[{extra}]'")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False
