"""Everything a run carries from one step to the next. What is not in `TrainState` is not saved.

Data order, learning rate and initialisation are pure functions of (seed, step), and nothing draws from a global
generator, so model, optimizer and two counters are all there is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.model.transformer import Transformer
from moetrain.moe.bank import logical_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """step: optimizer steps taken; tokens: valid tokens trained on."""

    model: Transformer
    optimizer: torch.optim.AdamW
    step: int = 0
    tokens: int = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, view) of all tensor state this rank holds; writing into a view restores it."""
        yield from prefixed("model", logical_tensors(self.model))
        for moment in MOMENTS:
            of = lambda parameter: self.optimizer.state[parameter][moment]  # noqa: E731, B023 (used at once)
            for name, view in logical_tensors(self.model, of):
                yield f"optim.{name}.{moment}", view

    def values(self) -> dict[str, int]:
        """The state that is not tensors."""
        return {"step": self.step, "tokens": self.tokens}

    def restore(self, values: dict[str, int]) -> None:
        """Take over counters from a checkpoint; every parameter has been stepped at every step, so one count serves."""
        self.step, self.tokens = values["step"], values["tokens"]
        for state in self.optimizer.state.values():
            state["step"].fill_(self.step)


def prefixed(prefix: str, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{prefix}.{name}", tensor) for name, tensor in named)
