"""Rules about the balance loss and the further losses."""

from collections.abc import Iterator

from moetrain.config.schema import Config
from moetrain.errors import ConfigError

RESERVED = ("ce", "total", "balance", "weighted")        # names of metrics, loss/<name>, that mean something else


def loss_names(config: Config, ranks: int) -> Iterator[ConfigError]:
    """A loss is reported by its name."""
    for name in RESERVED:
        if name in config.loss:
            yield ConfigError(160, f"a further loss is called {name}", where=f"loss.{name}._target_",
                              why=f"its metric loss/{name} would take the place of another",
                              next=f"loss.my_{name}._target_={config.loss[name]['_target_']}")


def pools(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Counts are pooled by one rule for all losses."""
    parts = {"balance": config.balance, **{f"loss.{name}": part for name, part in config.loss.items()}}
    rules = {name: (part["scope"], part["mode"]) for name, part in parts.items()       # a value that is none has been taken away
             if part.get("scope") in ("global", "node") and part.get("weight") and "mode" in part}
    if len(set(rules.values())) > 1:
        text = ", ".join(f"{name}: {scope}, {mode}" for name, (scope, mode) in rules.items())
        yield ConfigError(75, "the losses want counts pooled in different ways", where=", ".join(rules), why=text,
                          next="one scope and mode for all of them; further ones may have scope=micro or scope=sequence")
    for name, rule in rules.items():
        if rule == ("node", "warm"):
            yield ConfigError(76, f"{name}.mode=warm with {name}.scope=node", where=f"{name}.mode",
                              why="every machine would need a memory of its own step before, and checkpoints hold none",
                              next=f"{name}.mode=buffer, or {name}.scope=global")
