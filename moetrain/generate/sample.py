"""Text generation with a trained model, by temperature and nucleus (top-p) sampling.

A text begins after an end-of-document token, as every document of the training text does, and ends where the
model draws that token. Where training has seen no such token, the text begins with the prompt and has no end.

The model attends to the last `context` tokens, at positions from 0. As long as the text fits, keys and values
of earlier tokens are cached and only the newest token runs (generate/cache.py). Beyond that the window
slides: every token then has another position and, above the first layer, another past, so the whole window
runs again for each new token. It also runs whole from the first token on where experts have a capacity,
because which tokens are dropped depends on all tokens of a pass.

Where training keeps attention inside a document (data.mask_documents), the end-of-document token
at the beginning belongs to another document: the first token of the text is drawn from it alone,
and no later one attends to it.

Routers are told what they are told in training (routers/context.py): token ids, positions in the window, the
number of the text, the step of the checkpoint and the run's seed. The domain of a text is not known, so a
router that depends on it is refused. The same seed gives the same text with the cache and without, up to
rounding. generate/characters.py decodes the ids.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import largest_over
from moetrain.data.batches.batch import GENERATED_IDS
from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import shown
from moetrain.generate.cache import KeyValueCache
from moetrain.generate.characters import StreamingDecoder
from moetrain.model.transformer import Transformer
from moetrain.moe.capacity import CapacityPolicy
from moetrain.ops.pinned import to_device
from moetrain.routers.context import refuse_unknown, routers_of, token_context

# Below this temperature the most probable token is taken: logits that differ by 1e-3
# are a factor of e^1000 apart.
MIN_TEMPERATURE = 1e-6
# Fields of RouterContext that say nothing of a text that is being written. The domain is not known, and the
# sums of a sequence are not formed: behind a key-value cache a pass has one token.
UNKNOWN = frozenset({"domains_T", "seq_offsets"})


class TextKey(NamedTuple):
    """What routers are told of a generated text beside its tokens and their positions."""

    seed: int                                # of the run
    step: int                                # of the checkpoint
    sample_id: int                           # number of the text


def text_key(run_seed: int, step: int, seed: int) -> TextKey:
    """Key of the text that `generate.seed` draws; no sample of training or evaluation has its number.

    Args:
        run_seed: `run.seed`.
        step: step of the checkpoint.
        seed: `generate.seed`.
    """
    return TextKey(run_seed, step, GENERATED_IDS + seed % GENERATED_IDS)


class Continuation:
    """Continuation of a prompt: an iterator over pieces of text, to be used once.

    Each piece has whole characters. The attributes `tokens`, the ids drawn so far, and `ended`, whether the
    model has ended the document, change meanwhile.

    Args:
        ids: draws the ids.
        decoder: decodes them.
        end_id: id at which the text ends.
    """

    def __init__(self, ids: Iterator[int], decoder: StreamingDecoder, end_id: int | None) -> None:
        self._ids, self._decoder, self._end_id = ids, decoder, end_id
        self.tokens, self.ended = 0, False

    def __iter__(self) -> Iterator[str]:
        for chosen in self._ids:
            if chosen == self._end_id:
                self.ended = True
                break
            self.tokens += 1
            if piece := self._decoder.add(chosen):
                yield piece
        if piece := self._decoder.rest():
            yield piece


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str, *, end_id: int | None, tokens: int,
                  temperature: float, top_p: float, seed: int, run_seed: int, step: int, context: int,
                  cache: bool, mask_documents: bool, group: Group) -> Continuation:
    """Continue a prompt by up to `tokens` tokens, or to the end of the document.

    Tokens are drawn as the result is read.

    Args:
        model: the model; it stays in evaluation mode.
        tokenizer: the one that the model was trained with.
        prompt: text to continue; an empty one begins a document.
        end_id: id of the end-of-document token; None where training has seen none.
        tokens: most tokens to draw.
        temperature: temperature of the distribution; 0 takes the most probable token.
        top_p: probability mass to sample from.
        seed: seed of the draws.
        run_seed: seed of the run, by which routers key their random numbers.
        step: step of the checkpoint, by which routers keep their schedules.
        context: number of tokens that the model attends to.
        cache: whether to cache keys and values of earlier tokens.
        mask_documents: whether training kept attention inside a document.
        group: ranks that generate one text together; the first one draws.

    Returns:
        The continuation, not drawn yet.
    """
    begin = prompt_ids(tokenizer, prompt)
    if not begin and end_id is None:
        raise DataError(179, "there is nothing to begin a text with", where="generate.prompt",
                        why="no document that the run was trained on ends in an end token, "
                            "behind which a text could begin",
                        next="generate.prompt=<text>")
    refuse_unknown(model, UNKNOWN, "a text that is being written")
    first = begin if end_id is None else [end_id, *begin]
    model.eval()
    incremental = IncrementalModel(
        model, context, key=text_key(run_seed, step, seed), cache=cache,
        separate_first=mask_documents and end_id is not None)
    generator = torch.Generator().manual_seed(seed)

    def draws() -> Iterator[int]:
        ids = torch.tensor(first)
        for _ in range(tokens):
            logits_V = incremental.logits(ids)[:tokenizer.vocab_size]  # the rest are padding of the model
            drawn = draw(logits_V, temperature, top_p, generator)
            chosen = int(largest_over(group, drawn if group.position == 0 else -1))
            yield chosen
            ids = torch.cat([ids, ids.new_tensor([chosen])])

    return Continuation(draws(), StreamingDecoder(tokenizer, begin), end_id)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt; DataError where a text gives no tokens."""
    ids = [int(id) for id in tokenizer.encode(os.fsencode(prompt))]
    if prompt and not ids:
        raise DataError(174, "the prompt gives no tokens", where=f"generate.prompt={shown(prompt, 60)}",
                        why="the tokenizer of the run drops all of it",
                        next="another generate.prompt, or none: a new document begins")
    return ids


class IncrementalModel:
    """Next-token logits of a text that grows token by token.

    Args:
        model: the model, in evaluation mode.
        context: number of tokens that it attends to.
        key: what routers are told of the text.
        cache: whether to cache keys and values, where the model runs token by token.
        separate_first: whether the first token is the end of another document, to
            which the text does not attend.
    """

    def __init__(self, model: Transformer, context: int, *, key: TextKey, cache: bool,
                 separate_first: bool = False) -> None:
        self.model, self.context, self.key, self.separate_first = model, context, key, separate_first
        self.cache = KeyValueCache(model, context) if cache and runs_token_by_token(model) else None

    @torch.no_grad()
    def logits(self, ids_S: Tensor) -> Tensor:
        """Compute the logits of the next token. The host waits for the device here, once for every token.

        Args:
            ids_S: int64 [S] on the host, the whole text; it begins with that of the call before.

        Returns:
            float64 [V], on the host.
        """
        # What the newest token attends to.
        seen_S = ids_S[1:] if self.separate_first and len(ids_S) > 1 else ids_S
        if len(ids_S) > self.context:
            self.cache = None  # the window slides, so all positions change and the cache is invalid
        self._refresh(len(seen_S))
        # A separate first token is not cached: no later token attends to it.
        if self.cache is not None and (not self.separate_first or len(ids_S) > 1):
            begin = self.cache.length
            return self._last(seen_S[begin:], first=begin + len(ids_S) - len(seen_S), cache=self.cache)
        both = self.separate_first and 1 < len(ids_S) <= self.context
        return self._last(ids_S[-self.context:],
                          documents_S=(torch.arange(len(ids_S)) > 0).long() if both else None)

    def _refresh(self, length: int) -> None:
        """Empty a cache whose keys were rotated by another table than a text of this length takes."""
        if self.cache is None:
            return
        rotary = self.model.rotary
        if self.cache.length and rotary.is_long(length) != rotary.is_long(self.cache.length):
            self.cache = KeyValueCache(self.model, self.context)

    def _last(self, tokens_S: Tensor, *, first: int = 0, documents_S: Tensor | None = None,
              cache: KeyValueCache | None = None) -> Tensor:
        """Run tokens whose first one has the position `first` in the window; return the last one's logits."""
        device = self.model.embed.device
        tokens_BS = to_device(tokens_S[None], device)
        documents_BS = None if documents_S is None else to_device(documents_S[None], device)
        told = token_context(
            tokens_BS, seed=self.key.seed, step=self.key.step, training=False, first=first,
            sample_ids_B=torch.full_like(tokens_BS[:, 0], self.key.sample_id))
        output = self.model(tokens_BS, told, documents_BS, cache=cache)
        return output.logits_BSV[0, -1].double().cpu()


def runs_token_by_token(model: Transformer) -> bool:
    """Whether tokens depend on each other through attention only.

    A capacity of experts counts all tokens, and a router may read later ones.
    """
    return not noncausal_capacities(model) and all(router.causal for router in routers_of(model).values())


def noncausal_capacities(model: Transformer) -> list[str]:
    """Describe the capacities that count the tokens of a whole window."""
    capacities = (getattr(module, "capacity", None) for module in model.modules())
    return sorted({capacity.describe() for capacity in capacities
                   if isinstance(capacity, CapacityPolicy) and not capacity.causal})


def draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token; a temperature below MIN_TEMPERATURE takes the most probable one.

    Args:
        logits_V: float [V], on the host.
        temperature: divides the logits.
        top_p: probability mass to sample from.
        generator: source of randomness.
    """
    if temperature < MIN_TEMPERATURE:
        return int(logits_V.argmax())
    return int(torch.multinomial(nucleus(logits_V / temperature, top_p), 1, generator=generator))


def nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Probabilities of the smallest set of most probable tokens whose mass reaches top_p; the rest is 0."""
    probs, order = logits_V.softmax(-1).sort(descending=True, stable=True)
    kept = probs.where(probs.cumsum(-1) - probs < top_p, 0.0)
    return torch.zeros_like(probs).scatter(0, order, kept / kept.sum())
