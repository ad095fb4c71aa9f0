"""Start values that modules declare: which rule decides, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from moetrain.errors import ConfigError
from moetrain.model.initialization import declared_starts, initialize
from moetrain.ops.start import Start, constant, normal, values


class Inner(nn.Module):
    """A matrix, a number, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(3, 2))
        self.number = nn.Parameter(torch.tensor(0.07))
        self.register_buffer("prior", torch.full((4,), 5.0), persistent=False)

    def starts(self) -> dict[str, Start]:
        return {"matrix": normal(), "number": constant(0.07), "prior": constant(5)}


class Outer(nn.Module):
    """Starts what is inside it in its own way."""

    def __init__(self, declared: dict[str, Start]) -> None:
        super().__init__()
        self.inner, self.norm, self.declared = Inner(), nn.LayerNorm(2), declared

    def starts(self) -> dict[str, Start]:
        return self.declared


NORM = {"norm.weight": constant(1), "norm.bias": constant(0)}


def started(declared: dict[str, Start]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Outer(declared)
    starts = declared_starts(model)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    initialize(model, starts, seed=0, std=0.2, num_layers=2)
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def test_every_tensor_starts_as_its_module_says():
    found = started(NORM)
    assert found["inner.number"] == torch.tensor(0.07) and (found["inner.prior"] == 5).all()
    assert (found["norm.weight"] == 1).all() and not found["norm.bias"].any()
    assert 0 < found["inner.matrix"].abs().max() < 1


def test_the_outermost_rule_decides():
    found = started({**NORM, "inner.prior": values(lambda generator: torch.arange(4.0))})
    assert found["inner.prior"].tolist() == [0, 1, 2, 3] and found["inner.number"] == torch.tensor(0.07)


def test_a_tensor_of_another_name_keeps_its_numbers():
    renamed = started({**NORM, "inner.matrix": normal(drawn_as="matrix")})
    assert not renamed["inner.matrix"].equal(started(NORM)["inner.matrix"])
    assert started({**NORM, "inner.matrix": normal(drawn_as="inner.matrix")})["inner.matrix"].equal(
        started(NORM)["inner.matrix"])


@pytest.mark.parametrize("declared, number, what, advice", [
    ({}, 205, "norm.weight has no start value", 'in Outer: .*"norm.weight": constant'),
    ({"norm.weight": constant(1)}, 205, "norm.bias has no start value", '"norm.bias": constant'),
    ({**NORM, "norm.gain": constant(1)}, 206, "Outer gives a start value to norm.gain",
     "norm.bias, norm.weight"),
])
def test_what_has_no_start_or_no_tensor_is_refused(declared, number, what, advice):
    with pytest.raises(ConfigError, match=what) as caught:
        started(declared)
    assert caught.value.id == f"E-CONFIG-{number}"
    with pytest.raises(ConfigError, match=advice):
        started(declared)


def test_a_module_that_is_shared_starts_under_its_first_name():
    with torch.device("meta"):
        model = nn.ModuleDict({"first": Inner(), "norm": nn.Identity()})
        model["second"] = model["first"]
    starts = declared_starts(model)
    assert {"first.matrix", "second.matrix"} <= starts.keys()
    model.to_empty(device="cpu")
    initialize(model, starts, seed=0, std=0.2, num_layers=2)
    assert model["second"].number == torch.tensor(0.07)


def test_a_module_without_starts_is_named():
    with pytest.raises(ConfigError, match=r'table has no start value(.|\n)*"table": constant'):
        declared_starts(_Loose(buffer=True))


def test_a_tensor_that_is_neither_parameter_nor_buffer_is_refused():
    with pytest.raises(ConfigError, match=r"_Loose.table is a tensor(.|\n)*register_buffer\(\"table\""):
        declared_starts(_Loose(buffer=False))


class _Loose(nn.Module):
    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("table", torch.empty(2))
        else:
            self.table = torch.empty(2)
