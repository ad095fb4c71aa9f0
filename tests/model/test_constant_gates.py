"""A router that the task cannot train is refused, whoever wrote it."""

from pathlib import Path

import pytest
from torch import Tensor

from moetrain.config.compose import compose
from moetrain.errors import ConfigError, ConfigErrors
from moetrain.model.build import check_model
from moetrain.routers.base import LinearRouter, RouterContext, Scores
from moetrain.routers.topk import TopKRouter
from tests.support.own_routers import HashRouter, replace_routers


class UndeclaredRouter(LinearRouter):
    """Normalized weights, and no word of it."""

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        probs_TC = self.logits(x_TD).softmax(-1)
        return Scores(probs_TC, probs_TC)

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        weights_TK = super().weigh(scores, ids_TK, context)
        return 2 * weights_TK / weights_TK.sum(-1, keepdim=True)


class MeantRouter(UndeclaredRouter):
    CONSTANT_WEIGHTS = False


class TemperedRouter(TopKRouter):
    """Inherits what it says of an argument that it does not take."""

    def __init__(self, *, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)


class RawRouter(UndeclaredRouter):
    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        return LinearRouter.weigh(self, scores, ids_TK, context)


class LostRouter(UndeclaredRouter):
    """Needs what a trial does not have."""

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        assert "cell" in context.tied
        return super().scores(x_TD, context)


ONE = ["experiment=debug", "model.top_k=1", "router.weights=raw"]


@pytest.mark.parametrize("router, words, refused", [
    (UndeclaredRouter, ONE, True), (UndeclaredRouter, ["experiment=debug"], False), (MeantRouter, ONE, False),
    (TemperedRouter, ONE, True), (RawRouter, ONE, False), (HashRouter, ONE, False), (LostRouter, ONE, False)])
def test_weights_of_one_expert_without_gradient_are_refused(router, words, refused):
    def convert(model, config):
        replace_routers(model, router)

    if not refused:
        check_model(compose(words), convert)
        return
    with pytest.raises(ConfigError, match="layers.0.moe: the gate weight of a token's one") as caught:
        check_model(compose(words), convert)
    assert f"CONSTANT_WEIGHTS = False in {router.__name__}" in caught.value.next


PART = '''
from moetrain.routers.topk import TopKRouter

class Always(TopKRouter):
    CONSTANT_WEIGHTS = {}

class Own(TopKRouter):
    CONSTANT_WEIGHTS = {"norm": ["sum", "softmax"]}

    def __init__(self, *, dim: int, num_experts: int, top_k: int, norm: str = "sum") -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)

class Inherits(Own):
    pass

class Never(TopKRouter):
    CONSTANT_WEIGHTS = None

class Computed(TopKRouter):
    CONSTANT_WEIGHTS = dict(weights=["renorm"])

class Wrong(TopKRouter):
    CONSTANT_WEIGHTS = {"weight": ["renorm"]}
'''


@pytest.mark.parametrize("words, code, text", [
    (["Always"], 30, "model.top_k=1 cannot train the router"),
    (["Own"], 30, "model.top_k=1 with router.norm=sum cannot train"), (["Own", "router.norm=raw"], None, ""),
    (["Inherits", "router.norm=softmax"], 30, "router.norm=softmax"), (["Never"], None, ""),
    (["Computed"], 216, "it is computed"), (["Wrong"], None, "")])
def test_the_class_of_a_router_says_it(words, code, text, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "one_expert").mkdir()
    (tmp_path / "one_expert/__init__.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOETRAIN_PACKAGES", "one_expert")
    name, *rest = words
    topk = ("weights", "scale", "num_groups", "topk_groups", "group_score")
    given = ["experiment=debug", "model.top_k=1", f"router._target_=one_expert.{name}", *rest,
             *(f"~router.{argument}" for argument in topk)]
    if code is None:
        compose(given)
        return
    with pytest.raises((ConfigError, ConfigErrors)) as caught:
        compose(given)
    assert caught.value.id == f"E-CONFIG-{code:03d}" and text in str(caught.value)
