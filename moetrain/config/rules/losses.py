"""Rules about the balance loss and further losses."""

from collections.abc import Iterator

from moetrain.config.build import NoSuchPart, declared
from moetrain.config.rules.model import moe_layers
from moetrain.config.schema import Config
from moetrain.errors import ConfigError

# Names whose metric, loss/<name>, means something else.
RESERVED = ("ce", "total", "balance", "weighted")


def loss_names(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a further loss whose metric has the name of another."""
    for name in (*RESERVED, "mtp") if config.model.mtp_layers else RESERVED:
        if name in config.loss:
            yield ConfigError(160, f"a further loss is called {name}", where=f"loss.{name}._target_",
                              why=f"its metric loss/{name} would take the place of another",
                              next=f"loss.my_{name}._target_={config.loss[name]['_target_']}")


def pools(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Require one scope and mode of pooled counts for all losses."""
    parts = {"balance": config.balance, **{f"loss.{name}": part for name, part in config.loss.items()}}
    # An argument may be absent: a value that does not fit has been removed, and is reported on its own.
    rules = {name: (part["scope"], part["mode"]) for name, part in parts.items()
             if part.get("scope") in ("global", "node") and part.get("weight") and "mode" in part}
    if len(set(rules.values())) > 1:
        text = ", ".join(f"{name}: {scope}, {mode}" for name, (scope, mode) in rules.items())
        yield ConfigError(
            75, "the losses want counts pooled in different ways", where=", ".join(rules),
            why=text,
            next="one scope and mode for all of them; further ones may have scope=micro or scope=sequence")
    for name, rule in rules.items():
        if rule == ("node", "warm"):
            yield ConfigError(
                76, f"{name}.mode=warm with {name}.scope=node", where=f"{name}.mode",
                why="every machine would need its own counts of the step before, and checkpoints hold none",
                next=f"{name}.mode=buffer, or {name}.scope=global")


def equal_groups(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that the groups of experts of a loss are equal in every layer."""
    sizes = [num_experts for _, num_experts, _ in moe_layers(config)]
    for name, part in config.loss.items():
        groups = part.get("num_groups")
        if isinstance(groups, int) and any(experts % groups for experts in sizes):
            works = max(g for g in range(1, groups) if all(experts % g == 0 for experts in sizes))
            yield ConfigError(
                270, f"loss.{name}.num_groups={groups} does not divide the experts of a layer",
                where=f"loss.{name}.num_groups, model.num_experts", why="groups of experts are equal",
                next=f"loss.{name}.num_groups={works}")


def needed_sums(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a loss of sums that the router does not bring (`NEEDS_SUMS`, `BRINGS_SUMS`)."""
    try:
        brought = declared(str(config.router.get("_target_", "")), "router", "BRINGS_SUMS") or []
        needed = {name: declared(str(part.get("_target_", "")), "loss", "NEEDS_SUMS") or []
                  for name, part in config.loss.items() if part.get("weight", 1)}
    except NoSuchPart:                                       # reported where the part is checked
        return
    for name, sums in needed.items():
        if missing := [each for each in sums if each not in brought]:
            yield ConfigError(
                257, f"the router does not bring {missing[0]}, of which loss.{name} is made",
                where=f"loss.{name}._target_, router._target_",
                why="the loss is of a quantity that only some routers have",
                next=f"a router that brings it, as router=relu does l1_sum_E; or loss=[...] without {name}")
