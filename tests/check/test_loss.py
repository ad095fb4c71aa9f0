"""A loss that breaks a promise is found out, and by the check that is about it."""

import pytest
from torch import Tensor

from moetrain.check.findings import findings
from moetrain.check.loss import loss_checks
from moetrain.config.build import build
from moetrain.config.compose import compose
from moetrain.config.groups import group_options
from moetrain.losses.base import AuxLoss, Pooled
from moetrain.losses.z import ZLoss
from moetrain.routers.base import RoutingStats


class OfItsOwnTokens(ZLoss):
    """Divides by the tokens of the micro-batch."""

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return stats.lse2_sum / stats.tokens.clamp(min=1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        return {"lse2_sum": (1 / stats.tokens.clamp(min=1)).double()}


class WrongSlope(OfItsOwnTokens):
    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        return {name: 2 * slope for name, slope in super().slopes(stats, pooled).items()}


class ForgottenSlope(ZLoss):
    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return super().value(stats, pooled) + stats.entropy_sum / pooled.tokens.clamp(min=1)


class DividesByNothing(ZLoss):
    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return stats.lse2_sum / pooled.tokens


class AddsUpRouters(ZLoss):
    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        return super().value(stats, pooled).sum()


@pytest.mark.parametrize("cls, promise", [
    (OfItsOwnTokens, "contributions of parts of a batch add up"),
    (WrongSlope, "slopes are the gradient of the value"),
    (ForgottenSlope, "slopes are the gradient of the value"),
    (DividesByNothing, "a batch without tokens costs nothing and is finite"),
    (AddsUpRouters, "its value has one number for each router"),
])
def test_what_is_broken_is_found(cls: type[AuxLoss], promise: str) -> None:
    assert promise in [finding.name for finding in findings(loss_checks(cls)) if finding.problem]


# By the scope of a balance loss.
NOT_TRIED = {"micro": ["contributions of parts of a batch add up"],
             "sequence": ["a batch without tokens costs nothing and is finite"]}


@pytest.mark.parametrize("section, option", [
    (group, option) for group in ("balance", "loss") for option in group_options()[group]])
def test_every_loss_of_conf_keeps_all_promises(section: str, option: str) -> None:
    config = compose([f"{section}={option}" if section == "balance" else f"loss=[{option}]",
                      "router=relu" if option == "l1_lb" else "router.noise=vmoe"])
    nodes = [config.balance] if section == "balance" else list(config.loss.values())
    for node in nodes:
        found = list(findings(loss_checks(lambda: build(node, section))))
        assert len(found) == 4 and [finding for finding in found if finding.problem] == []
        scope = getattr(build(node, section), "scope", None)
        assert [finding.name for finding in found if finding.not_tried] == NOT_TRIED.get(scope, [])
