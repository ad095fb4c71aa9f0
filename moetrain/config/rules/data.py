"""Rules about what is learned."""

from collections.abc import Iterator

from moetrain.config.schema import Config
from moetrain.errors import ConfigError


def data_path(config: Config, ranks: int) -> Iterator[ConfigError]:
    place = {"tokens": "<folder written by moetrain data prepare>",
             "megatron": "<prefix of a .bin and .idx, or a folder of them>"}.get(config.data.kind)
    if place and not config.data.path:
        yield ConfigError(36, f"data={config.data.kind} without data.path", where="data.path, data.kind",
                          why="only text and generated tokens are built in", next=f"data.path={place}, or data=text")
