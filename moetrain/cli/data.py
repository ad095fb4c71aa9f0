"""moetrain data prepare [key=value ...]: tokenise text into shards once, ahead of training.

data.path names a file or a folder (null: the built-in corpus), data.cache where the shards go (null: <run.dir>/data).
Training does the same by itself on its first start. The name of a run that is there prepares the data of that run.
"""

from moetrain.config.compose import compose, run_dir
from moetrain.config.suggest import nearest
from moetrain.errors import ConfigError

_SUBCOMMANDS = ("prepare",)


def run(argv: list[str]) -> int:
    if not argv or argv[0] not in _SUBCOMMANDS:
        given = argv[0] if argv else ""
        near = nearest(given, _SUBCOMMANDS) or list(_SUBCOMMANDS)
        raise ConfigError(42, f"there is no verb data {given}".rstrip(), where="the command line",
                          why=f"data can {', '.join(_SUBCOMMANDS)}", next=f"moetrain data {near[0]}")
    config = compose(argv[1:])
    if config.data.kind in ("synthetic", "megatron", "memmap"):
        raise ConfigError(44, f"data={config.data.kind} has nothing to prepare", where="data.kind",
                          why="only text is turned into tokens", next="moetrain data prepare data=text")
    from moetrain.data.prepare import prepare_from_config
    from moetrain.train.console import connect_logging
    from moetrain.train.preparing import Preparing

    connect_logging(print)                               # what was found, and how much of it is held out
    with Preparing(bar=config.log.progress) as progress:
        folder = prepare_from_config(config, run_dir(config), progress)
    print(folder)
    return 0
