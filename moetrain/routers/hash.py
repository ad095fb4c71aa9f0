"""Hash routing: the expert of a token is a fixed function of its id (Hash Layers).

    modulo      r_j(t) = ((a_j t + b_j) mod p) mod (E - j),  p = 2^31 - 1;  the token takes the expert of rank
                r_0 among all, then that of rank r_1 among those left, and so on
    balanced    ids from the most to the least frequent, each to the K experts with the fewest tokens so far

Every expert of a token has the weight 1 / K. There is no parameter: the router is the control of learned
ones. a_j and b_j are drawn from `seed` and the name of the router, so layers hash differently.

Roller et al. 2021, 2106.04426. With K = 1, `modulo` is ((a t + b) mod p) mod E. The paper has one expert a
token, and splits the expert in two for several hashes (MultiHash); here K hashes choose K whole experts. Its
random hash is a table of drawn experts, which `modulo` replaces by two numbers a layer. Its balanced
assignment counts the tokens of the training text; here a file has the counts (`counts_path`). The table is
made when the model is built, and its file must be there then; the one of the checkpoint is loaded over it.

Shapes: T tokens, V ids of the vocabulary, E experts, K slots.
"""

import hashlib
import heapq
import random
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.ops.start import Start, values
from moetrain.routers.base import Router, RouterContext, Scores

PRIME = 2**31 - 1


class HashRouter(Router):
    """Router without parameters, which looks up the experts of each token id.

    Args:
        num_experts: E.
        top_k: K, number of slots of a token.
        vocab_size: V.
        name: name of the router.
        table: rule of the table: modulo or balanced.
        seed: seed of the hash functions.
        counts_path: of an .npy file with the number of occurrences of each id [V], for `balanced`; None
            counts all ids alike.
    """

    BOUNDS = {"seed": "0 or more"}
    START_ARGUMENTS = ("table", "seed", "counts_path")
    holds_ids = True
    depends_on = frozenset({"token_ids_T"})

    def __init__(self, *, num_experts: int, top_k: int, vocab_size: int, name: str,
                 table: Literal["modulo", "balanced"] = "modulo", seed: int = 0,
                 counts_path: str | None = None) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        assert table in ("modulo", "balanced") and 0 < vocab_size < PRIME, (table, vocab_size)
        self.rule, self.seed, self.name, self.counts_path = table, seed, name, counts_path
        self.register_buffer("table", torch.empty(vocab_size, top_k, dtype=torch.int32))

    def starts(self) -> dict[str, Start]:
        return {"table": values(lambda generator: self.made_table())}

    def made_table(self) -> Tensor:
        """Make the table int32 [V, K], on the host."""
        vocab_size = len(self.table)
        generator = random.Random(int.from_bytes(
            hashlib.blake2b(f"{self.seed}/{self.name}".encode(), digest_size=8).digest(), "little"))
        if self.rule == "modulo":
            made = modulo_table(vocab_size, self.num_experts, self.top_k, generator)
        else:
            made = balanced_table(self._counts(vocab_size), self.num_experts, self.top_k, generator)
        return torch.from_numpy(made.astype(np.int32))

    def scores(self, x_TD: Tensor, context: RouterContext) -> Scores:
        """Nothing: the id alone decides."""
        return Scores(None)

    def choose(self, order_TC: Tensor | None, context: RouterContext) -> Tensor:
        """Look up the experts of each token."""
        assert context.token_ids_T is not None, "hash routing is told of token ids"
        return self.table[context.token_ids_T].long()

    def _counts(self, vocab_size: int) -> np.ndarray:
        """Read the file of counts; refuse one that does not count this vocabulary."""
        if self.counts_path is None:
            return np.ones(vocab_size, np.int64)
        try:
            counts_V = np.load(Path(self.counts_path).expanduser(), allow_pickle=False)
            fault = "" if _counts_all(counts_V, vocab_size) else (
                f"it holds {counts_V.dtype} of shape {list(counts_V.shape)}, and needs whole numbers, 0 or "
                f"more, of shape [{vocab_size}]")
        except (OSError, ValueError) as error:
            fault = str(error)
        if fault:
            raise ConfigError(
                258, f"router.counts_path={self.counts_path} does not count {vocab_size} ids",
                where="router.counts_path", why=fault,
                next=f"an .npy file of {vocab_size} whole numbers, how often each id occurs; or "
                     "router.counts_path=null, where all count alike")
        return counts_V


def _counts_all(counts_V: np.ndarray, vocab_size: int) -> bool:
    return counts_V.shape == (vocab_size,) and counts_V.dtype.kind in "iu" and bool((counts_V >= 0).all())


def modulo_table(vocab_size: int, num_experts: int, top_k: int, generator: random.Random) -> np.ndarray:
    """Make the table of `modulo`, int64 [V, K].

    Args:
        vocab_size: V.
        num_experts: E.
        top_k: K.
        generator: draws a_j, then b_j, for j = 0 to K - 1.
    """
    ids_V, chosen_VK = np.arange(vocab_size, dtype=np.int64), np.empty((vocab_size, 0), np.int64)
    for taken in range(top_k):
        factor, shift = generator.randrange(1, PRIME), generator.randrange(PRIME)
        expert_V = (factor * ids_V + shift) % PRIME % (num_experts - taken)     # its rank among those left
        for before_V in np.sort(chosen_VK, axis=1).T:
            expert_V += expert_V >= before_V
        chosen_VK = np.concatenate([chosen_VK, expert_V[:, None]], axis=1)
    return chosen_VK


def balanced_table(counts_V: np.ndarray, num_experts: int, top_k: int,
                   generator: random.Random) -> np.ndarray:
    """Make the table of `balanced`, int64 [V, K].

    Equally loaded experts take turns: first by the number of their ids, then by an order that is drawn.

    Args:
        counts_V: occurrences of each id.
        num_experts: E.
        top_k: K.
        generator: draws the order of equally loaded experts.
    """
    order = generator.sample(range(num_experts), num_experts)
    loads = [(0, 0, place, expert) for place, expert in enumerate(order)]
    table_VK = np.empty((len(counts_V), top_k), np.int64)
    for token in np.argsort(-counts_V.astype(np.int64), kind="stable"):
        least = [heapq.heappop(loads) for _ in range(top_k)]
        for load, ids, place, expert in least:
            heapq.heappush(loads, (load + int(counts_V[token]), ids + 1, place, expert))
        table_VK[token] = [expert for *_, expert in least]
    return table_VK
