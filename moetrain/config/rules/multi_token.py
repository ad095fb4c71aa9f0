"""Rules about multi-token prediction: what cannot be trained beside it."""

from collections.abc import Iterator

from moetrain.config.build import NoSuchPart, declared
from moetrain.config.schema import Config
from moetrain.errors import ConfigError


def targets_ahead(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Require that the deepest module has a target in a sequence."""
    modules, seq_len = config.model.mtp_layers, config.train.seq_len
    if modules and modules >= seq_len:
        yield ConfigError(
            308, f"model.mtp_layers={modules} with train.seq_len={seq_len}",
            where="model.mtp_layers, train.seq_len",
            why="module k predicts the token k + 1 ahead, which is in no sequence of this length",
            next=f"model.mtp_layers={max(0, seq_len - 1)}, or a longer train.seq_len")


def scored_ahead(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a language loss that does not say that it scores targets further ahead (`ahead`)."""
    target = str(config.language_loss.get("_target_", ""))
    if config.model.mtp_layers and not _declares(target, "language_loss", "ahead"):
        yield ConfigError(
            305, f"model.mtp_layers={config.model.mtp_layers} with the language loss {_name(target)}",
            where="language_loss, model.mtp_layers",
            why="modules of multi-token prediction are scored by the language loss on the tokens further "
                "ahead, and this one does not say that it may be",
            next="language_loss=cross_entropy, or model.mtp_layers=0; or ahead = True in the class, if it "
                 "reads no more of a batch than the targets, of which -1 is none")


def experts_by_tokens(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a router that steers the experts of a token by the tokens of the step (`BY_TOKENS`)."""
    target = str(config.router.get("_target_", ""))
    if config.model.mtp_layers and _declares(target, "router", "BY_TOKENS"):
        yield ConfigError(
            307, f"model.mtp_layers={config.model.mtp_layers} with the router {_name(target)}",
            where="router, model.mtp_layers",
            why="it aims at a number of experts for each token of the step, and modules of multi-token "
                "prediction route fewer tokens: the last ones of a sequence have none ahead",
            next="another router, or model.mtp_layers=0")


def _declares(target: str, family: str, name: str) -> bool:
    try:
        return bool(declared(target, family, name))
    except NoSuchPart:                                       # reported where the part is checked
        return name == "ahead"


def _name(target: str) -> str:
    return target.rpartition(".")[2]
