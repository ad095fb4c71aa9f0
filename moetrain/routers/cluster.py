"""Routing to fixed centroids, without a trained gate (Moirai-MoE).

    s_i = -|x - m_i|  (prefer=nearest)        m [E, D], of each layer: k-means of what its router sees
    s_i = |x - m_i|   (prefer=farthest)       the k largest s are chosen; gate weights: softmax of theirs

Liu et al. 2024, "Moirai-MoE" (arXiv 2410.10469). The text routes to clusters by distance. The released code
(SalesforceAIResearch/uni2ts) takes the k largest distances and softmaxes these, so it prefers the farthest
centroids; nearest is the default here, farthest that code.

`centroids_path` is a file that `python -m tools.centroids <run> <file>` makes from a trained model: an .npz
with one array [E, D] for each router, by its name (layers.3.moe). Without a file the centroids are random
points, a baseline. They are a buffer, and so in checkpoints: evaluation and generation do not read the file.

Nothing of the router is trained; gate weights have a gradient at the token. Its probabilities, the softmax of
s over all experts, have none: balance losses only report, since nothing that they could move is a router's.

Shapes: T tokens, D model width, E experts, K slots.
"""

from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.ops.start import Start, normal, values
from moetrain.routers.base import Router, RouterContext, Scores

_CLOSE = 1e-24                               # a squared distance, at which the root still has a gradient


class ClusterRouter(Router):
    """Router by distance to fixed centroids.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, number of slots of a token.
        name: name of the router.
        centroids_path: file of centroids; null: random points.
        prefer: nearest or farthest centroids.
    """

    START_ARGUMENTS = ("centroids_path",)
    CONSTANT_WEIGHTS = False                 # nothing of it is trained
    choice_tensors = frozenset({"centroids"})

    def __init__(self, *, dim: int, num_experts: int, top_k: int, name: str,
                 centroids_path: str | None = None,
                 prefer: Literal["nearest", "farthest"] = "nearest") -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        assert prefer in ("nearest", "farthest"), prefer
        self.sign = -1 if prefer == "nearest" else 1
        self.name, self.centroids_path = name, centroids_path
        self.register_buffer("centroids", torch.empty(num_experts, dim))
        if centroids_path is not None:
            read_centroids(centroids_path, name, (num_experts, dim))        # an error before anything starts

    def starts(self) -> dict[str, Start]:
        path, shape = self.centroids_path, tuple(self.centroids.shape)
        if path is None:
            return {"centroids": normal(1.0)}
        return {"centroids": values(lambda _: torch.from_numpy(read_centroids(path, self.name, shape)))}

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Score experts by distance."""
        x_TD = x_TD.to(self.centroids.dtype)
        squares_TE = (x_TD.square().sum(-1, keepdim=True) + self.centroids.square().sum(-1)
                      - 2 * x_TD @ self.centroids.T)
        scores_TE = self.sign * squares_TE.clamp(min=_CLOSE).sqrt()
        return Scores(scores_TE.detach(), scores_TE, scores_TE.detach())

    def weigh(self, scores: Scores, ids_TK: Tensor, context: RouterContext) -> Tensor:
        """Softmax of the scores of the chosen experts."""
        assert scores.gates_TC is not None
        used_TK = ids_TK >= 0
        chosen_TK = scores.gates_TC.gather(1, ids_TK.clamp(min=0)).masked_fill(~used_TK, float("-inf"))
        # A row of padding has no score: its softmax would be NaN, in backward, too.
        chosen_TK = chosen_TK.where(used_TK.any(-1, keepdim=True), 0)
        return chosen_TK.softmax(-1).where(used_TK, 0)

    def probabilities(self, scores: Scores) -> Tensor | None:
        """Softmax of the scores of all experts, without gradient."""
        assert scores.order_TC is not None
        return scores.order_TC.softmax(-1)


def read_centroids(path: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read the centroids of a router from a file.

    Args:
        path: the file.
        name: name of the router.
        shape: E and D.

    Returns:
        float array [E, D].

    Raises:
        ConfigError: the file cannot be read, has no such router, or other sizes.
    """
    place = Path(path).expanduser()
    make = f"python -m tools.centroids <run> {path}, from a run of this width"
    try:
        with np.load(place, allow_pickle=False) as file:
            others, found = file.files, file[name] if name in file.files else None
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        why = f"{type(error).__name__}: {error}" if place.exists() else "there is no such file"
        raise ConfigError(264, f"{path} holds no centroids", where="router.centroids_path", why=why,
                          next=f"{make}; or router.centroids_path=null for random points") from error
    if found is None:
        why = f"it has {', '.join(others) or 'nothing'}"
    elif found.shape != shape or found.dtype.kind != "f":
        why = f"{name} is {found.dtype} {list(found.shape)}"
    else:
        return found
    raise ConfigError(265, f"{path} has no centroids {list(shape)} of {name}",
                      where="router.centroids_path, model.num_experts, model.dim", why=why, next=make)
