"""moetrain data prepare|inspect [key=value ...]: tokenize text ahead of training, or show what it holds.

    moetrain data prepare                  tokenize text into shards, once
    moetrain data inspect [PATH] [--json]  show what would be read; writes nothing

data.path names a file or a folder (null: the built-in corpus), data.cache where the shards go (null:
<run.dir>/data). Training prepares by itself on its first start. The name of an existing run prepares the data
of that run.

`inspect` takes the path as a bare word too. It shows the format of each file, what is left out and why,
splits, domains, documents, bytes, the tokens to expect, epochs at run.steps, and three documents as they are
trained on. With data=memmap, data=megatron or data=tokens it opens token files as training does, and also
shows tokens, end token and weights.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from moetrain.config.compose import compose, run_dir
from moetrain.config.schema import Config
from moetrain.config.suggest import nearest
from moetrain.errors import ConfigError, DataError

_SUBCOMMANDS = ("prepare", "inspect")


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    if not argv or argv[0] not in _SUBCOMMANDS:
        given = argv[0] if argv else ""
        near = nearest(given, _SUBCOMMANDS) or list(_SUBCOMMANDS)
        raise ConfigError(42, f"there is no verb data {given}".rstrip(), where="the command line",
                          why=f"data can {', '.join(_SUBCOMMANDS)}", next=f"moetrain data {near[0]}")
    return prepare(compose(argv[1:])) if argv[0] == "prepare" else inspect(argv[1:])


def prepare(config: Config) -> int:
    """Tokenize the text of a config and print the folder of the shards."""
    if config.data.kind not in ("text", "tokens"):
        raise _nothing_to(config, "prepare", "only text is turned into tokens")
    from moetrain.data.preparation.prepare import prepare_from_config
    from moetrain.train.loggers.prepare_progress import Preparing

    with _logged(), Preparing(bar=config.log.progress) as progress:
        folder = prepare_from_config(config, run_dir(config), progress)
    print(folder)
    return 0


@contextmanager
def _logged() -> Iterator[None]:
    """Print log messages, which say what was found and how much of it is held out."""
    from moetrain.train.loggers.console import connect_logging

    restore = connect_logging(print)
    try:
        yield
    finally:
        restore()


def _nothing_to(config: Config, verb: str, why: str) -> ConfigError:
    return ConfigError(44, f"data={config.data.kind} has nothing to {verb}", where="data.kind", why=why,
                       next=f"moetrain data {verb} data=text")


def inspect(words: Sequence[str]) -> int:
    """Print an inspection, then raise DataError where training could not read the files."""
    as_json = "--json" in words
    config = compose([word if "=" in word or word[:1] in "-~+" else f"data.path={word}"
                      for word in words if word != "--json"])
    if config.data.kind == "synthetic":
        raise _nothing_to(config, "inspect", "generated tokens lie in no file")
    if config.data.kind == "text":
        from moetrain.cli.corpus_report import as_record, lines
        from moetrain.data.inspection import inspect as inspected
    else:
        from moetrain.cli.token_report import as_record, lines
        from moetrain.data.token_inspection import inspect_tokens as inspected
    from moetrain.train.loggers.prepare_progress import Preparing

    bar = config.log.progress and not as_json
    with nullcontext() if as_json else _logged(), Preparing(bar=bar) as progress:
        found = inspected(config, Path(run_dir(config)), progress)
    if as_json:
        print(json.dumps(as_record(found), indent=1, ensure_ascii=False))
    else:
        print("\n".join(lines(found, config)))
    if found.found is None:
        assert isinstance(found.error, DataError)
        raise found.error
    return 0
