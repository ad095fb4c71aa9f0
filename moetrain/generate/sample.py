"""Text from a trained model: temperature and nucleus (top-p) sampling.

The model looks at the last `context` tokens, at positions from 0. As long as the text fits, keys and values of earlier
tokens are kept and only the newest token runs (generate/cache.py). Beyond, the window slides: every token then has
another position and, above the first layer, another past, so the whole window runs again for each new token. So it does,
from the first token on, where experts have a capacity: who is dropped depends on all the tokens of a pass.

Routers are in evaluation mode. The same seed gives the same text, with the cache and without, up to rounding.
"""

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import largest_over
from moetrain.data.tokenizer import Tokenizer
from moetrain.generate.cache import KeyValueCache
from moetrain.model.transformer import Transformer
from moetrain.moe.capacity import CapacityPolicy
from moetrain.ops.pinned import to_device
from moetrain.routers.base import RouterContext

COLDEST = 1e-6                   # logits that differ by 1e-3 are then a factor of e^1000 apart


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str, *, tokens: int, temperature: float,
                  top_p: float, seed: int, context: int, cache: bool, group: Group) -> str:
    """Prompt and continuation: up to `tokens` new ones, fewer when the document ends.

    context: tokens the model looks at. group: ranks that write the same text together; the first one draws.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer.end_id, *(int(i) for i in tokenizer.encode(prompt.encode()))])
    model.eval()
    reader = Reader(model, context, cache=cache)
    for _ in range(tokens):
        drawn = draw(reader.logits(ids), temperature, top_p, generator)
        chosen = int(largest_over(group, drawn if group.position == 0 else -1))
        if chosen == tokenizer.end_id:
            break
        ids = torch.cat([ids, ids.new_tensor([chosen])])
    return tokenizer.decode(ids[1:].tolist())


class Reader:
    """The model in front of a text that grows, token by token."""

    def __init__(self, model: Transformer, context: int, *, cache: bool) -> None:
        self.model, self.context = model, context
        self.cache = KeyValueCache(model, context) if cache and runs_token_by_token(model) else None

    @torch.no_grad()
    def logits(self, ids_S: Tensor) -> Tensor:
        """Logits [V] of the token after these, which are on the host, too; float64. `ids_S` begin with those of the call before.

        Here the host waits for the device, once for every token.
        """
        if len(ids_S) > self.context:
            self.cache = None                            # positions start anew: nothing in it holds any more
        seen = 0 if self.cache is None else self.cache.length
        tokens_BS = to_device(ids_S[max(seen, len(ids_S) - self.context):][None], self.model.embed.device)
        return self.model(tokens_BS, RouterContext(training=False), cache=self.cache).logits_BSV[0, -1].double().cpu()


def runs_token_by_token(model: Transformer) -> bool:
    """Whether attention is all that a token sees of the others; a capacity counts them."""
    return all(type(block.moe.capacity) is CapacityPolicy for block in model.layers if block.moe is not None)


def draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token; temperature 0 takes the most probable, and so does one at which nothing else is left of the others."""
    if temperature < COLDEST:
        return int(logits_V.argmax())
    return int(torch.multinomial(nucleus(logits_V / temperature, top_p), 1, generator=generator))


def nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Probabilities of the smallest set of tokens, most probable first, whose mass reaches top_p; the rest is 0."""
    probs, order = logits_V.softmax(-1).sort(descending=True, stable=True)
    kept = probs.where(probs.cumsum(-1) - probs < top_p, 0.0)
    return torch.zeros_like(probs).scatter(0, order, kept / kept.sum())
