"""Rules about keys whose value is a path."""

from collections.abc import Iterator

from moetrain.config.schema import Config
from moetrain.config.values import flatten, schema_keys
from moetrain.errors import ConfigError


def empty_paths(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse an empty path: an unset shell variable leaves one, and it would mean the current folder."""
    values = flatten(config)
    for path, key in schema_keys().items():
        if key.is_path and isinstance(values[path], str) and not values[path].strip():
            yield ConfigError(
                101, f"{path} is empty", where=path,
                why="an empty path would mean the current folder; an unset shell variable leaves one",
                next=f"{path}={'<path>' if key.default is None else key.default}, or leave {path} out")


def unknown_homes(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse `~user` of a user who does not exist."""
    values = flatten(config)
    for path, key in schema_keys().items():
        if key.is_path and str(values[path]).startswith("~"):
            user = values[path].partition("/")[0]
            yield ConfigError(
                102, f"{path}={values[path]}: there is no user {user[1:]}", where=path,
                why=f"{user} stands for a home directory",
                next=f"{path}=./{values[path]} for a folder of that name")
