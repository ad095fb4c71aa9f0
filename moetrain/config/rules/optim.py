"""Rules about the optimizer."""

from collections.abc import Iterator

from moetrain.config.schema import Config
from moetrain.errors import ConfigError


def betas(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Require two decays, one for each moment of AdamW."""
    if len(config.optim.betas) != 2:
        yield ConfigError(37, f"optim.betas has {len(config.optim.betas)} entries", where="optim.betas",
                          why="AdamW has two moments", next="optim.betas=[0.9,0.95]")
