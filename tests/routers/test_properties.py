"""What every router of conf/router/ promises, whatever it routes by (moetrain/check/router.py)."""

import pytest
import torch

from moetrain.check.findings import findings
from moetrain.check.router import router_checks
from moetrain.config.groups import group_options
from tests.support.any_router import D, E, context, every_router, router_of, tokens


@every_router
def test_it_keeps_all_promises(option, overrides):
    found = list(findings(router_checks(lambda: router_of(option, overrides), D)))
    assert len(found) == 8 and [finding for finding in found if finding.problem] == []


@pytest.mark.parametrize("option", group_options()["router"])
def test_experts_may_be_named_in_any_order(option):
    """Without groups, which are sets of consecutive ids."""
    router, renamed = router_of(option, []), router_of(option, [])
    order = torch.randperm(E, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, its in zip((*renamed.parameters(), *renamed.buffers()),
                             (*router.parameters(), *router.buffers())):
            ours.copy_(its[order])
    ours, its = renamed.route(tokens(20), context(20)), router.route(tokens(20), context(20))
    assert order[ours.ids_TK].equal(its.ids_TK)
    torch.testing.assert_close(ours.weights_TK, its.weights_TK)
