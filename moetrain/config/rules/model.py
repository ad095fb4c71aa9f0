"""Rules about the sizes of the model, and about routers, which depend on them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, get_args

from moetrain.config.architecture import attention_top_k, num_attention_experts
from moetrain.config.build import NoSuchPart, arguments, constant_weights, declared
from moetrain.config.layer_pattern import is_sparse, parse_pattern, per_layer, sparse_layers
from moetrain.config.rules.attention import PLAIN_ATTENTION
from moetrain.config.rules.wording import choose, divisors
from moetrain.config.schema import Config, ModelConfig
from moetrain.config.sizes import ids_of
from moetrain.config.values import show
from moetrain.errors import ConfigError

_LONGEST_LIST = 200          # entries that advice writes out


def heads(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that heads divide evenly and have an even width."""
    model = config.model
    if model.num_heads % model.num_kv_heads:
        yield ConfigError(23, f"model.num_kv_heads={model.num_kv_heads} does not divide "
                              f"model.num_heads={model.num_heads}",
                          where="model.num_kv_heads, model.num_heads",
                          why="every key-value head serves the same number of heads",
                          next=choose("model.num_kv_heads", divisors(model.num_heads)))
    if model.head_dim is None and model.attention != "mla" and model.dim % model.num_heads:
        yield ConfigError(24, f"model.num_heads={model.num_heads} does not divide model.dim={model.dim}",
                          where="model.num_heads, model.dim",
                          why="model.head_dim is null, so a head is dim / num_heads wide",
                          next=f"{choose('model.num_heads', divisors(model.dim))}; or set model.head_dim")
        return
    head_dim = model.head_dim or model.dim // model.num_heads
    if head_dim % 2 and model.attention != "mla":
        yield ConfigError(
            25, f"a head is {head_dim} wide, an odd number",
            where="model.head_dim" if model.head_dim else "model.dim, model.num_heads",
            why="the rotary embedding turns pairs of numbers",
            next=f"model.head_dim={head_dim + 1}")


def attention_experts(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check what attention experts do not hold, and that mesh and groups of experts fit their number."""
    model, router, parallel = config.model, config.router, config.parallel
    if model.attention in ("plain", "mla") or model.num_heads % model.num_kv_heads:
        return
    experts, top_k = num_attention_experts(model), attention_top_k(model)
    sliced = model.attention == "sliced"
    number = "model.num_heads" if sliced else "model.num_attention_experts"

    def refused(what: str, where: str, why: str, instead: str) -> ConfigError:
        return ConfigError(282, f"model.attention={model.attention} {what}",
                           where=f"model.attention, {where}", why=why,
                           next=f"{instead}; or model.attention=plain")

    for name, default in PLAIN_ATTENTION.items():
        value = getattr(model, name)
        if value != default:
            yield refused(f"with model.{name}={show(value)}", f"model.{name}",
                          "queries and keys are those of experts, which have none of the options of plain "
                          "attention", f"model.{name}={show(default)}")
    if sliced and model.num_kv_heads != model.num_heads:
        yield refused(f"with model.num_kv_heads={model.num_kv_heads}", "model.num_kv_heads, model.num_heads",
                      "a slice is one head, with keys and values of its own",
                      f"model.num_kv_heads={model.num_heads}")
    if sliced and top_k > experts:
        yield refused(f"with model.top_k_heads={top_k}", "model.top_k_heads, model.num_heads",
                      f"there are {experts} heads", f"model.top_k_heads={experts}")
    elif top_k > experts:
        yield refused(f"has {experts} of them, and a token takes num_heads / num_kv_heads = {top_k}",
                      "model.num_attention_experts, model.num_heads, model.num_kv_heads",
                      "a token takes each at most once", f"model.num_attention_experts={top_k}")
    ep = parallel.ep or ranks
    if parallel.mode in ("ep", "ep_fsdp") and experts % ep:
        yield refused(f"cannot hold {experts} of them on {ep} positions",
                      f"{number}, parallel.ep",
                      "each rank must hold the same number of experts",
                      f"{number}={-(-experts // ep) * ep}")
    groups, used = int(router.get("num_groups", 1)), int(router.get("topk_groups", 1))
    if groups >= 1 and top_k <= experts and (experts % groups or used * (experts // groups) < top_k):
        yield refused(f"with router.num_groups={groups} and router.topk_groups={used}",
                      f"{number}, router.num_groups, router.topk_groups",
                      "groups divide the attention experts, too, and those of a token hold what it takes",
                      "router.num_groups=1 router.topk_groups=1")


def layers(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check counts of layers and the lengths of lists with one entry a layer."""
    model = config.model
    if model.first_dense_layers > model.num_layers:
        yield ConfigError(26, f"model.first_dense_layers={model.first_dense_layers} is more than "
                              f"model.num_layers={model.num_layers}",
                          where="model.first_dense_layers, model.num_layers",
                          why="the dense layers are the first of all layers",
                          next=f"model.first_dense_layers={model.num_layers} or less")
    for name in ("num_experts", "top_k", "expert_dim"):
        entries = getattr(model, name)
        if isinstance(entries, list) and len(entries) != model.num_layers:
            repaired = (entries + entries[-1:] * _LONGEST_LIST)[:model.num_layers]
            yield ConfigError(
                27, f"model.{name} has {len(entries)} entries for {model.num_layers} layers",
                where=f"model.{name}, model.num_layers",
                why="a list has one entry per layer, dense layers included",
                next=f"model.{name}={show(repaired)}" if entries and model.num_layers <= _LONGEST_LIST else
                     f"model.{name}=<number>")


def layer_pattern(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that model.moe_layers is a pattern or names layers of the model, and that a layer has experts.

    A model without any is asked for by first_dense_layers alone.
    """
    model, given = config.model, config.model.moe_layers
    written, last = f"model.moe_layers={show(given)}", model.num_layers - 1
    named = given if isinstance(given, list) else []
    outside = [layer for layer in named if not 0 <= layer <= last]
    twice = [layer for layer, times in Counter(named).items() if times > 1]
    if given is not None and model.first_dense_layers:
        yield ConfigError(
            221, f"{written} with model.first_dense_layers={model.first_dense_layers}",
            where="model.moe_layers, model.first_dense_layers",
            why="each of them says which layers are dense",
            next="model.first_dense_layers=0, or model.moe_layers=null")
        return
    if isinstance(given, str) and parse_pattern(given) is None:
        wrong, why = f"{written} is no pattern of layers", "every_<n> and every_<n>_from_<layer> are patterns"
    elif outside:
        wrong = f"{written} names layer {outside[0]} of {model.num_layers}"
        why = f"layers are numbered from 0 to {last}"
    elif twice:
        wrong, why = f"{written} names layer {twice[0]} twice", "a layer is named once"
    elif not len(sparse_layers(model)) and model.first_dense_layers < model.num_layers:
        wrong, why = "no layer has experts", f"{written} and model.num_experts={show(model.num_experts)}"
    else:
        return
    yield ConfigError(
        220, wrong, where="model.moe_layers, model.num_experts, model.num_layers", why=why,
        next=f"model.moe_layers=every_{min(2, model.num_layers)} or model.moe_layers=[{last}], with "
             "model.num_experts=8; or model.moe_layers=null "
             f"model.first_dense_layers={model.num_layers} for a model without experts")


def dense_width(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse dense layers without width: one is top_k experts wide unless model.dense_dim is set."""
    model = config.model
    entries = model.top_k if isinstance(model.top_k, list) else [model.top_k]
    dense = len(sparse_layers(model)) < model.num_layers
    if isinstance(model.top_k, list):
        entries = [top_k for layer, top_k in enumerate(model.top_k) if not is_sparse(model, layer)]
    if dense and model.dense_dim is None and 0 in entries:
        most = max(model.top_k) if isinstance(model.top_k, list) else 1
        widths = model.expert_dim if isinstance(model.expert_dim, list) else [model.expert_dim]
        yield ConfigError(
            103, "a dense layer is 0 wide",
            where="model.dense_dim, model.top_k, model.moe_layers, model.first_dense_layers",
            why="model.dense_dim is null, so it is top_k * expert_dim wide, and its top_k is 0",
            next=f"model.dense_dim={(most or 1) * (max(widths) if widths else 128)}")


def sliced_quantized(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse slices of experts whose form quantizes them, because values depend on the whole matrix."""
    try:
        quantized = declared(str(config.expert.get("_target_", "")), "expert", "QUANTIZED")
    except NoSuchPart:                                       # reported where the part is checked
        return
    if quantized and config.parallel.mode == "fssdp" and config.parallel.max_sliced_experts:
        yield ConfigError(
            215, "experts that are quantized cannot be sliced",
            where="expert._target_, parallel.max_sliced_experts",
            why=f"{quantized[0]} and others are quantized as whole matrices, and a rank has slices of them",
            next="parallel.max_sliced_experts=0")


def vocabulary(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that model.vocab_size has a row for every id, where the config tells how many there are."""
    try:
        model_vocabulary(config.model, ids_of(config))
    except ConfigError as error:
        yield error


def model_vocabulary(sizes: ModelConfig, ids: int) -> int:
    """Return the rows of embedding and head; ConfigError where `model.vocab_size` is less than the ids.

    Args:
        sizes: section `model` of the config.
        ids: ids of the data's vocabulary.
    """
    if sizes.vocab_size is None:
        return ids
    if sizes.vocab_size < ids:
        raise ConfigError(
            222, f"model.vocab_size={sizes.vocab_size} is less than the {ids} ids of the data",
            where="model.vocab_size", why="every id has a row of the embedding; rows beyond are padding",
            next=f"model.vocab_size={ids} or more, or null")
    return sizes.vocab_size


def experts(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check that every layer with experts has at least top_k of them."""
    for layer, num_experts, top_k in moe_layers(config):
        if num_experts < 1 or top_k < 1:
            yield ConfigError(28, f"layer {layer} has num_experts={num_experts} and top_k={top_k}",
                              where="model.num_experts, model.top_k, model.moe_layers",
                              why="a layer with experts needs at least one of each",
                              next="model.num_experts=8 model.top_k=2; or model.moe_layers=<layers with "
                                   "experts>, which leaves the others dense")
        elif top_k > num_experts:
            yield ConfigError(
                29, f"model.top_k={top_k} is more than model.num_experts={num_experts} (layer {layer})",
                where="model.top_k, model.num_experts",
                why="a token takes each expert at most once",
                next=f"model.top_k={num_experts} or model.num_experts={top_k}")
        else:
            continue
        return  # one layer is enough of an example


def experts_of_a_token(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check in every layer the bounds of a router that gives tokens different numbers of experts."""
    least, bound = config.router.get("k_min", 0), config.router.get("k_max")
    for where, num_experts, top_k, experts_key, top_k_key in choices(config):
        most = num_experts if bound is None else bound
        target = config.router.get("target_k") or top_k
        if not least <= most <= num_experts:
            fitting = min(most, num_experts)
            yield ConfigError(
                254, f"a token cannot take from {least} to {most} of {num_experts} experts ({where})",
                where=f"router.k_min, router.k_max, {experts_key}",
                why="k_min is not more than k_max, nor k_max more than the experts; null is all of them",
                next=f"router.k_min={min(least, fitting)} router.k_max={fitting}")
        elif "target_k" in config.router and not least <= target <= most:
            nearest = min(max(target, least), most)
            yield ConfigError(
                255, f"tokens cannot take {show(target)} experts in the mean ({where})",
                where=f"router.target_k, {top_k_key}, {experts_key}",
                why=f"a token takes from {least} to {most} of them", next=f"router.target_k={show(nearest)}")
        else:
            continue
        return  # one layer is enough of an example


def mapped_logits(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse a map of the logits of the layer before between layers with different numbers of experts."""
    routed = config.model.attention in ("experts", "sliced")
    of_attention = {num_attention_experts(config.model)} if routed else set()
    numbers = sorted(of_attention | {num_experts for _, num_experts, _ in moe_layers(config)})
    if config.router.get("map_logits") and len(numbers) > 1:
        yield ConfigError(
            256, f"router.map_logits=true, and layers have {numbers[0]} and {numbers[-1]} experts",
            where="router.map_logits, model.num_experts",
            why="a router maps the logits of the layer before by a square matrix",
            next=f"router.map_logits=false, or model.num_experts={numbers[-1]}")


def router_gradient(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse gate weights that sum to a constant with one expert a token: the weight has no gradient.

    The router's class says with which arguments they do (`CONSTANT_WEIGHTS` in routers/base.py).
    """
    target = str(config.router.get("_target_", ""))
    try:
        constant, accepted = constant_weights(target), arguments(target, "router")
    except NoSuchPart:
        return
    if constant is None or all(top_k != 1 for _, _, top_k in moe_layers(config)):
        return
    chosen = {name: config.router.get(name, accepted[name].default) for name in constant}
    if all(value in constant[name] for name, value in chosen.items()):
        others = [f"router.{name}={show(choice)}" for name in constant
                  for choice in get_args(accepted[name].type) if choice not in constant[name]]
        yield ConfigError(
            30, " with ".join(["model.top_k=1", *(f"router.{name}={show(value)}" for name, value in
                                                  chosen.items())]) + " cannot train the router",
            where=", ".join(["model.top_k", *(f"router.{name}" for name in chosen)]),
            why="the weight of one expert is then constant: the task gives the router no gradient",
            next=" or ".join(others) or "model.top_k=2")


def groups(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Check in every layer that groups of experts are equal and that those of a token hold top_k experts."""
    chosen = config.router.get("num_groups", 1), config.router.get("topk_groups", 1)
    sizes = [(num_experts, top_k) for _, num_experts, top_k in moe_layers(config)
             if 1 <= top_k <= num_experts]

    def works(number: int, used: int) -> bool:
        return 1 <= used <= number and all(n % number == 0 and used * (n // number) >= k for n, k in sizes)

    if sizes and not works(*chosen):
        most = max(n for n, _ in sizes)
        pairs = [(number, used) for number in divisors(most)
                 for used in _group_counts(number, chosen[1], sizes) if works(number, used)]
        number, used = min(pairs, key=lambda pair: (pair[0] != chosen[0], pair[1] != chosen[1], pair))
        yield ConfigError(
            63, "router.num_groups={} with router.topk_groups={} does not fit the experts".format(*chosen),
            where="router.num_groups, router.topk_groups, model.num_experts, model.top_k",
            why="num_groups divides model.num_experts; topk_groups groups hold model.top_k experts or more",
            next=f"router.num_groups={number} router.topk_groups={used}")


def quantiles_of_groups(config: Config, ranks: int) -> Iterator[ConfigError]:
    """Refuse quantile balancing where tokens choose inside groups."""
    number, used = config.router.get("num_groups", 1), config.router.get("topk_groups", 1)
    if config.router.get("balance") == "quantile" and used < number:
        yield ConfigError(
            267, f"router.balance=quantile with router.topk_groups={used} of router.num_groups={number}",
            where="router.balance, router.num_groups, router.topk_groups",
            why="what an expert lacks to be chosen depends on its group, and so on the biases of others",
            next=f"router.topk_groups={number}; or router=sigmoid router.balance=sign, a bias with groups")


def _group_counts(number: int, chosen: int, sizes: list[tuple[int, int]]) -> set[int]:
    """Propose how many of `number` groups a token uses: as configured, or the fewest that are enough."""
    return {chosen, max(-(-k // max(1, n // number)) for n, k in sizes)}


class Choice(NamedTuple):
    """A choice of a token among experts.

    Attributes:
        where: whose experts, for a message.
        num_experts: how many there are.
        top_k: how many a token takes.
        experts_key: key that says how many there are.
        top_k_key: key that says how many a token takes.
    """

    where: str
    num_experts: int
    top_k: int
    experts_key: str = "model.num_experts"
    top_k_key: str = "model.top_k"


def choices(config: Config) -> list[Choice]:
    """List the choice of the first layer of each kind with experts, and that of attention experts."""
    model = config.model
    found = [Choice(f"layer {layer}", experts, top_k) for layer, experts, top_k in moe_layers(config)]
    if model.attention in ("experts", "sliced") and model.num_heads % model.num_kv_heads == 0:
        keys = (("model.num_heads", "model.top_k_heads") if model.attention == "sliced" else
                ("model.num_attention_experts", "model.num_kv_heads"))
        found.append(Choice("attention", num_attention_experts(model), attention_top_k(model), *keys))
    return found


def moe_layers(config: Config) -> list[tuple[int, int, int]]:
    """List (layer, num_experts, top_k) of the first layer of each kind with experts.

    Lists that are too short end early.
    """
    model, found = config.model, dict[tuple[int, int], int]()
    sparse = sparse_layers(model)
    lists = [entries for entries in (model.num_experts, model.top_k) if isinstance(entries, list)]
    if not lists:
        sparse = sparse[:1]
    given = min(map(len, lists), default=model.num_layers)
    for layer in sparse:
        if layer < given:
            sizes = per_layer(model.num_experts, layer), per_layer(model.top_k, layer)
            found.setdefault(sizes, layer)
    return [(layer, *sizes) for sizes, layer in found.items()]
