"""Random numbers that are a function of their key: the same on every mesh, device and recomputation.

    uniform        in (0, 1), exact on every device
    coarse_uniform the same with 16 bits, for a quarter of the time
    normal         standard normal; float32 within one unit in the last place on every device
    gumbel         standard Gumbel: argmax(logits + gumbel) draws from softmax(logits)
    integers       in [0, below), exact on every device
    permutation    a random order of n things for each token, exact on every device

A number is keyed by

    seed, step, router, draw, use    one of each in a micro-batch: hashed together by BLAKE2b to 64 bits
    sample id, position              of each token: hashed by the finalizer of SplitMix64
    index                            of the number, 0 to n - 1

No generator holds a state that moves, so neither the split of a batch over ranks and micro-batches nor a
second forward pass changes a number. Hashes are computed in int64, whose products wrap around modulo 2^64 on
every device; a shift is made logical by a mask. A float32 uniform number is the float64 one of the same key
to within 2^-24.

Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"; the constants of the finalizer
are those of Stafford's variant 13.

Shapes: T tokens, n numbers of a token.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from moetrain.ops.pinned import to_device

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)      # as int64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_BITS = {torch.float32: 23, torch.float64: 52}  # one less than a mantissa: the half step is exact, too


# Tensors of RouterContext that key a number: `Router.depends_on` of routers that draw.
KEYED_BY = frozenset({"sample_ids_T", "positions_T"})


class Key(Protocol):
    """What numbers are keyed by; `RouterContext` (routers/base.py) is one."""

    @property
    def seed(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def router(self) -> str: ...
    @property
    def draw(self) -> int: ...
    @property
    def draws(self) -> int: ...
    @property
    def sample_ids_T(self) -> Tensor | None: ...  # noqa: N802
    @property
    def positions_T(self) -> Tensor | None: ...  # noqa: N802


def uniform(key: Key, n: int, *, use: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw numbers that are uniform in (0, 1): never 0 or 1, and symmetric around a half.

    Args:
        key: the context of the call.
        n: numbers of a token.
        use: tells apart what one router draws for several purposes, such as jitter and noise.
        dtype: float32 or float64.

    Returns:
        [T, n].
    """
    digits = _BITS[dtype]
    return (_shift(bits(key, n, use=use), 64 - digits).to(dtype) + 0.5) * 2.0 ** -digits


def coarse_uniform(key: Key, n: int, *, use: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw multiples of 2^-17 in (0, 1), four from the bits of one number of `uniform`: for many numbers.

    Arguments as in `uniform`; [T, n], exact on every device.
    """
    drawn_TN = bits(key, -(-n // 4), use=use)
    quarters = [(drawn_TN >> places) & 0xFFFF for places in (0, 16, 32, 48)]
    return (torch.stack(quarters, -1).flatten(1)[:, :n].to(dtype) + 0.5) * 2.0 ** -16


def normal(key: Key, n: int, *, use: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal numbers [T, n]. Arguments as in `uniform`."""
    return torch.special.ndtri(uniform(key, n, use=use, dtype=torch.float64)).to(dtype)


def gumbel(key: Key, n: int, *, use: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard Gumbel numbers [T, n]. Arguments as in `uniform`."""
    return -(-uniform(key, n, use=use, dtype=torch.float64).log()).log().to(dtype)


def integers(key: Key, n: int, below: int, *, use: str = "") -> Tensor:
    """Draw integers from 0 to below - 1, each with the same probability to within 2^-32.

    Args:
        key: the context of the call.
        n: numbers of a token.
        below: at most 2^31.
        use: tells apart what one router draws for several purposes.

    Returns:
        int64 [T, n].
    """
    assert 0 < below <= 1 << 31, below
    return (_shift(bits(key, n, use=use), 32) * below) >> 32


def permutation(key: Key, n: int, *, use: str = "") -> Tensor:
    """Draw a random order of 0 to n - 1 for each token, int64 [T, n]; its first k are k different choices.

    Args:
        key: the context of the call.
        n: number of things.
        use: tells apart what one router draws for several purposes.
    """
    return bits(key, n, use=use).argsort(dim=-1, stable=True)


def bits(key: Key, n: int, *, use: str = "") -> Tensor:
    """Draw 64 random bits for each number, int64 [T, n]. Arguments as in `uniform`."""
    samples_T, positions_T = key.sample_ids_T, key.positions_T
    assert samples_T is not None and positions_T is not None, "numbers are keyed by sample and position"
    hashed_T = _mix(_mix(samples_T + _GAMMA) ^ _roots(key, use, samples_T))
    hashed_T = _mix(_mix(positions_T + _GAMMA) ^ hashed_T)
    index_n = _mix(torch.arange(1, n + 1, device=hashed_T.device) * _GAMMA)
    return _mix(hashed_T[:, None] ^ index_n)


def _roots(key: Key, use: str, samples_T: Tensor) -> int | Tensor:
    """The root of each token, or the one of all: a batch that runs twice along T has a root for each half."""
    if key.draws == 1:
        return root(key, use)
    assert len(samples_T) % key.draws == 0, (len(samples_T), key.draws)
    roots = torch.tensor([root(key, use, number) for number in range(key.draws)])
    return to_device(roots, samples_T.device).repeat_interleave(len(samples_T) // key.draws)


def root(key: Key, use: str = "", number: int = 0) -> int:
    """Hash what the tokens of one draw have in common to an int64; `number` counts from the key's draw."""
    text = repr((int(key.seed), int(key.step), key.router, int(key.draw) + number, use))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """Map int64 to int64 one to one, so that every bit depends on every bit; 0 stays 0."""
    x = (x ^ _shift(x, 30)).mul_(_FIRST)                     # in place: most of the time goes into memory
    x = x.bitwise_xor_(_shift(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift int64 to the right and fill with zeros; `>>` alone fills with the sign."""
    return (x >> places).bitwise_and_((1 << (64 - places)) - 1)
