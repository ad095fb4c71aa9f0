"""Modules of stock transformers in float64, as oracles; a test that uses them is skipped without the package.

Some of them cast to float32 inside. `in_float64` gives such a module its own forward with float64 in these
places, made of the installed source, so that it can be compared to more digits than a float32 has.
"""

import importlib
import inspect
import sys
import textwrap
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from tests.support.needs import module

# What transformers casts by, and what takes its place.
_CASTS = {"torch.float32": "torch.float64", "dtype=torch.float,": "dtype=torch.float64,",
          "dtype=torch.float)": "dtype=torch.float64)",
          ".float()": ".double()"}


def stock(family: str, name: str) -> Any:
    """A class or function of a family's module in transformers, such as `mixtral`, `MixtralTopKRouter`."""
    module("transformers", extra="hf")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def config_of(family: str, name: str, **values: Any) -> Any:
    """A config of a family, such as `mixtral`, `MixtralConfig`."""
    module("transformers", extra="hf")
    cls = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), name)
    return cls(**values)


def in_float64(made: nn.Module) -> nn.Module:
    """Let a module of transformers compute in float64 throughout."""
    for each in made.double().modules():
        forward = _rewritten(type(each))
        if forward is not None:
            each.forward = MethodType(forward, each)
    return made


@cache
def _rewritten(cls: type[nn.Module]) -> Any:
    """The forward of a class of transformers with other dtypes; None where it casts nowhere."""
    own = not cls.__module__.startswith("transformers.")
    return None if own else function_in_float64(inspect.unwrap(cls.forward))


def function_in_float64(function: Any) -> Any:
    """A function of transformers with other dtypes; None where it casts nowhere."""
    source = textwrap.dedent(inspect.getsource(function))
    if not any(cast in source for cast in _CASTS):
        return None
    for narrow, wide in _CASTS.items():
        source = source.replace(narrow, wide)
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(source, namespace)  # the installed package's own code
    return namespace[function.__name__]
