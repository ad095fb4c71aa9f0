"""Which domains are read together, and how often: the groups of a mixture.

    proportional, all weights alike    one group: all text, as it lies
    proportional                       a group of each weight: what has the same weight is read as one text
    uniform                            each domain is a group

Of those, groups shorter than a window are read as one more group, which comes as often as they would: alone, their windows would
repeat the same text. Inside it domains come by their size. A window may hold tokens of several domains of its group.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from moetrain.data.batches.order import whole_shares


class Group(NamedTuple):
    domains: list[int]
    share: int                   # of windows, in the ratio of those of the others


def mixture_groups(mixture: str, *, tokens: Sequence[int], weights: Sequence[float],
                   seq_len: int) -> list[Group]:
    """The groups of a mixture.

    Args:
        mixture: `proportional` (domains by their size) or `uniform` (each alike).
        tokens: of each domain; one without any is in no group.
        weights: how many times as often as the mixture alone has it a domain comes; 0 leaves it out.
        seq_len: targets of a window.
    """
    used = [domain for domain, (size, weight) in enumerate(zip(tokens, weights)) if size and weight]
    if not used:
        return []
    alike: dict[object, list[int]] = {}
    for domain in used:
        alike.setdefault(domain if mixture == "uniform" else weights[domain], []).append(domain)
    if len(alike) == 1:
        return [Group(used, 1)]
    shares = {tuple(domains): Fraction(weights[domains[0]]) * (1 if mixture == "uniform"
                                                               else sum(tokens[d] for d in domains))
              for domains in alike.values()}
    short = [domains for domains in shares if sum(tokens[d] for d in domains) < seq_len]
    if len(short) > 1:
        pooled = tuple(sorted(domain for domains in short for domain in domains))
        shares[pooled] = sum((shares.pop(domains) for domains in short), Fraction())
    return [Group(list(domains), share) for domains, share in zip(shares,
                                                                  whole_shares(list(shares.values())))]
