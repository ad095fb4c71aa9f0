"""Modules that several routers use, such as one recurrent cell for all layers.

A router makes them in `Router.shared_modules`, by name, and takes them from `Router.shared`. The model keeps
one of each name at its root (`Transformer.tied`) and hands all of them to routers as `RouterContext.tied`. A
router that held such a module itself would have FSDP2 shard it with one block, while others need it.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from moetrain.errors import ConfigError


class TiedModules(nn.ModuleDict):
    """Modules that several routers use, by name."""


def one_of_each(shared: Iterable[Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """Keep one module of each name.

    Args:
        shared: the modules of each router, made anew by each.

    Returns:
        The first module of each name.

    Raises:
        ConfigError: two routers mean different modules by one name.
    """
    found: dict[str, nn.Module] = {}
    for modules in shared:
        for name, module in modules.items():
            ours, its = _described(found.setdefault(name, module)), _described(module)
            if ours != its:
                raise ConfigError(
                    263, f"two routers share different modules as {name}", where="shared_modules of routers",
                    why=f"one is {ours}, another is {its}, and the model keeps one module of each name",
                    next="a name for each kind, with sizes that are the same in all layers")
    return found


def _described(module: nn.Module) -> str:
    """Class and shapes of a module: what two of one name have in common."""
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in module.state_dict().items())
    return f"{type(module).__name__} ({shapes})"
