"""Groups of a mixture: which domains are read together, and how often.

    proportional, all weights alike    one group: all text, in the order of the stream
    proportional                       a group for each weight: domains of equal weight are read as one text
    uniform                            a group for each domain

Groups shorter than a window are merged into one more group, which comes as often as they would: alone, their
windows would repeat the same text. Inside it domains come by their size. A window may hold tokens of several
domains of its group.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from moetrain.data.batches.order import whole_shares


class Group(NamedTuple):
    """Domains that are read as one text.

    Args:
        domains: their indices.
        share: share of the windows, in the ratio of the shares of all groups.
    """

    domains: list[int]
    share: int


def mixture_groups(mixture: str, *, tokens: Sequence[int], weights: Sequence[float],
                   seq_len: int) -> list[Group]:
    """Form the groups of a mixture.

    Args:
        mixture: `proportional` (domains by their size) or `uniform` (each alike).
        tokens: tokens of each domain; a domain without any is in no group.
        weights: factor on how often the mixture alone would read each domain; 0 leaves it out.
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
    shares: dict[tuple[int, ...], Fraction] = {}
    for domains in alike.values():
        size = 1 if mixture == "uniform" else sum(tokens[domain] for domain in domains)
        shares[tuple(domains)] = Fraction(weights[domains[0]]) * size
    short = [domains for domains in shares if sum(tokens[d] for d in domains) < seq_len]
    if len(short) > 1:
        pooled = tuple(sorted(domain for domains in short for domain in domains))
        shares[pooled] = sum((shares.pop(domains) for domains in short), Fraction())
    counts = whole_shares(list(shares.values()))
    return [Group(list(domains), share) for domains, share in zip(shares, counts)]
