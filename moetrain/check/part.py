"""All checks of the parts that a config chooses: router, losses, and their training on several meshes."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moetrain.check.findings import Check, Finding, findings
from moetrain.check.training import Arm, compare, described, reference, shown, train
from moetrain.config.build import build
from moetrain.config.schema import Config

if TYPE_CHECKING:
    from moetrain.losses.base import AuxLoss

# How a training is spread, and what of a part each way finds out.
WAYS = {
    "again, in one process": [],
    "micro-batches of 2, recomputed": ["train.micro_batch=2", "train.activation_checkpointing=selective"],
    "counted first, in micro-batches of 4": ["train.micro_batch=4", "train.count_pass=true"],
    "2 ranks, expert parallel": ["run.nproc=2", "parallel=ep"],
    "2 ranks, fully sharded": ["run.nproc=2", "parallel=fsdp", "train.activation_checkpointing=full"],
    "2 ranks, fssdp": ["run.nproc=2", "parallel=fssdp"],
}


class Section(NamedTuple):
    """Checks with one subject."""

    title: str
    findings: Iterator[Finding]
    number: int


def sections(config: Config, overrides: list[str], out: Path | None) -> Iterator[Section]:
    """List the checks of a config, section by section. They run as they are iterated over.

    Args:
        config: the config that the overrides describe.
        overrides: of `moetrain train`.
        out: folder of the runs; None calls the parts alone, and trains nothing.
    """
    from moetrain.check.loss import loss_checks
    from moetrain.check.router import router_checks
    from moetrain.model.build import router_of

    make_router = partial(router_of, config)
    yield _section(f"router  {config.router['_target_']}", list(router_checks(make_router, config.model.dim)))
    losses = {"balance": config.balance, **{f"loss.{name}": node for name, node in config.loss.items()}}
    for name, node in losses.items():
        make: Callable = partial(build, node, "balance" if name == "balance" else "loss")
        taken = Check("the objective takes it", partial(_is_taken, name, make),
                      "moetrain train with this loss says what to type")
        yield _section(f"{name}  {node['_target_']}", [taken, *loss_checks(make)])
    if out is not None:
        yield Section("training beside one process, float64", _trainings(overrides, out), len(WAYS) + 1)


def _is_taken(name: str, make: Callable[[], "AuxLoss"]) -> None:
    from moetrain.train.objective import check_loss

    check_loss(name, make())


def _section(title: str, checks: list[Check]) -> Section:
    return Section(title, findings(checks), len(checks))


def _trainings(overrides: list[str], out: Path) -> Iterator[Finding]:
    given = ["run.steps=8", *overrides]
    truth = reference(given)
    problem = train(truth, out)
    yield Finding("it trains", problem, "the log of the run says more")
    if problem:
        return
    for name, way in WAYS.items():
        arm = Arm(name, "float64", [*described(given), *way])
        problem = train(arm, out)
        result = {"failed": problem} if problem else compare(out, arm)
        said = None if result.get("equal") else shown(result)
        yield Finding(f"{name}: {shown(result)}" if said is None else name, said,
                      "a number depends on the split: on a rank's own tokens, the global random state, or "
                      "the order of calls")
