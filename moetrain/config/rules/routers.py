"""Rules about single routers: the experts a token that they need, and options that exclude each other."""

from collections.abc import Iterator

from moetrain.config.architecture import attention_top_k, expert_width
from moetrain.config.build import NoSuchPart, declared
from moetrain.config.rules.model import choices, moe_layers
from moetrain.config.schema import Config
from moetrain.config.values import show
from moetrain.errors import ConfigError

_OWN = "moetrain.routers."
EXPERT_CHOICE = "moetrain.routers.expert_choice.ExpertChoiceRouter"
FIXED_RANDOM = "moetrain.routers.fixed_random.FixedRandomRouter"
DOMAIN = "moetrain.routers.domain.DomainRouter"
NULL_EXPERT = "moetrain.routers.null_expert.NullExpertRouter"


def fixed_top_k(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse another model.top_k than the one that a router needs (`TOP_K` of its class)."""
    target = str(config.router.get("_target_", ""))
    try:
        needed = declared(target, "router", "TOP_K")
    except NoSuchPart:                                       # reported where the part is checked
        return
    second = config.router.get("second_expert", "top")
    if not needed and second != "top":
        needed, target = 2, f"router.second_expert={second}"
    model, other = config.model, "another router" if second == "top" else "router.second_expert=top"
    given = [(f"model.top_k={top_k} (layer {layer})", top_k, "model.top_k", f"model.top_k={needed}")
             for layer, _, top_k in moe_layers(config)]
    if model.attention in ("experts", "sliced"):
        top_k = attention_top_k(model)
        given.append((f"model.attention={model.attention}, where it chooses {top_k}", top_k,
                      "model.attention", "model.attention=plain"))
    for what, top_k, key, fitting in given if needed else ():
        if top_k != needed:
            yield ConfigError(
                252, f"{target.removeprefix(_OWN)} with {what}",
                where=f"{key}, " + ("router._target_" if second == "top" else "router.second_expert"),
                why=f"it chooses exactly {needed} experts a token", next=f"{fitting}, or {other}")
            return


def second_by_gates(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a second expert that is random where gates do not choose, or where quantiles balance choices."""
    noise, second = config.router.get("noise"), config.router.get("second_expert", "top")
    if noise == "gumbel" and second == "random":
        yield ConfigError(
            251, "router.second_expert=random with router.noise=gumbel",
            where="router.second_expert, router.noise",
            why="the second expert is kept by its gate, and Gumbel noise chooses without changing the gates",
            next="router.second_expert=sample, or router.noise=none")
    if second != "top" and config.router.get("balance") == "quantile":
        yield ConfigError(
            253, f"router.second_expert={second} with router.balance=quantile",
            where="router.second_expert, router.balance",
            why="quantiles are those of scores by which both experts are chosen, the best two",
            next="router.second_expert=top, or router.balance=none")


def load_of_noise(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse the load loss of a router whose choice has no normal noise: it would have no gradient."""
    router = config.router
    loads = [name for name, part in config.loss.items()
             if part.get("_target_") == "moetrain.losses.load.LoadLoss" and part.get("weight")]
    if not loads or not str(router.get("_target_", "")).startswith(_OWN):
        return
    broken = {                               # what it is, the key, why, and what to type
        "without normal noise": (router.get("noise") not in ("normal", "vmoe"), "router.noise",
                                 "and has no gradient without noise", "router=topk router.noise=vmoe"),
        "that chooses inside groups": (router.get("topk_groups", 1) < router.get("num_groups", 1),
                                       "router.num_groups", "which depends on whole groups, too",
                                       "router.num_groups=1"),
        "with selection biases": (router.get("balance") == "quantile", "router.balance",
                                  "which biases change", "router.balance=none"),
        "that chooses all experts": (any(top_k == experts for _, experts, top_k in moe_layers(config)),
                                     "model.top_k", "which is certain", "a smaller model.top_k"),
    }
    for what, (is_so, key, why, advice) in broken.items():
        if is_so:
            yield ConfigError(
                250, f"the loss {loads[0]} of a router {what}", where=f"loss.{loads[0]}, {key}",
                why=f"it counts how likely noise is to choose each expert again, {why}",
                next=f"{advice}, or loss=[importance]")
            return


def choice_capacity(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse experts that choose more tokens than there are."""
    capacity = config.router.get("capacity")
    if config.router.get("_target_") != EXPERT_CHOICE or capacity is None:
        return
    for choice in choices(config):
        if capacity > choice.num_experts:
            yield ConfigError(
                259, f"router.capacity={show(capacity)} is more than "
                     f"{choice.experts_key}={choice.num_experts} ({choice.where})",
                where=f"router.capacity, {choice.experts_key}",
                why="it is the mean number of experts of a token, which takes each at most once",
                next=f"router.capacity={choice.num_experts} or less")
            return


def growing_k(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a number of experts that would shrink."""
    k_min = config.router.get("k_min", 1)
    if config.router.get("_target_") != FIXED_RANDOM:
        return
    for choice in choices(config):
        if k_min > choice.top_k:
            yield ConfigError(
                260, f"router.k_min={k_min} is more than the {choice.top_k} experts of a token "
                     f"({choice.where})",
                where=f"router.k_min, {choice.top_k_key}",
                why="a token has router.k_min experts at the beginning, and these at the end",
                next=f"router.k_min={choice.top_k} or less" + (
                    f", or model.top_k={k_min}" if choice.top_k_key == "model.top_k" else ""))
            return


def constants_of_the_width(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse learned vectors in place of experts where the experts work in another width than the model."""
    model, number = config.model, config.router.get("num_constant", 0)
    if config.router.get("_target_") == NULL_EXPERT and number and expert_width(model) != model.dim:
        yield ConfigError(
            301, f"router.num_constant={number} with model.block={model.block}",
            where="router.num_constant, model.block, model.latent_dim",
            why=f"the vectors are model.dim={model.dim} wide, and are added to outputs of experts, which are "
                f"{expert_width(model)} wide",
            next=f"router.num_constant=0, or model.latent_dim={model.dim}")


def domain_lists(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Require lists of experts that there are, each long enough for a token."""
    if config.router.get("_target_") != DOMAIN:
        return
    for where, num_experts, top_k, experts_key, top_k_key in choices(config):
        for number, own in enumerate(config.router.get("experts") or ()):
            unknown = [expert for expert in own if not 0 <= expert < num_experts]
            if unknown:
                wrong, why = f"has expert {unknown[0]}", f"experts are numbered from 0 to {num_experts - 1}"
            elif len(set(own)) < top_k:
                wrong, why = f"has {len(set(own))} experts", f"a token of the domain takes {top_k} of them"
            else:
                continue
            fitting = sorted({expert for expert in own if expert not in unknown} | set(range(num_experts)))
            yield ConfigError(
                261, f"list {number} of router.experts {wrong} ({where})",
                where=f"router.experts, {experts_key}, {top_k_key}", why=why,
                next=f"a list such as {show(fitting[:max(top_k, len(own))])} in its place")
            return
