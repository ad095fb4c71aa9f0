"""Text from a trained model: temperature and nucleus (top-p) sampling.

Every new token runs the last `train.seq_len` tokens through the model again; a cache of keys and values comes with later
work. Routers are in evaluation mode. The same seed gives the same text.
"""

import torch
from torch import Tensor

from moetrain.data.tokenizer import Tokenizer
from moetrain.model.transformer import Transformer
from moetrain.routers.base import RouterContext


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str, *, tokens: int, temperature: float,
                  top_p: float, seed: int, context: int) -> str:
    """Prompt and continuation: up to `tokens` new ones, fewer when the document ends. context: tokens the model looks at."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer.end_id, *(int(i) for i in tokenizer.encode(prompt.encode()))], device=model.embed.device)
    model.eval()
    for _ in range(tokens):
        chosen = next_token(model, ids[-context:], temperature, top_p, generator)
        if chosen == tokenizer.end_id:
            break
        ids = torch.cat([ids, ids.new_tensor([chosen])])
    return tokenizer.decode(ids[1:].tolist())


@torch.no_grad()
def next_token(model: Transformer, tokens_S: Tensor, temperature: float, top_p: float,
               generator: torch.Generator) -> int:
    """One token after `tokens_S`; temperature 0 takes the most probable."""
    logits_V = model(tokens_S[None], RouterContext(training=False)).logits_BSV[0, -1].double().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(nucleus(logits_V / temperature, top_p), 1, generator=generator))


def nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Probabilities of the smallest set of tokens, most probable first, whose mass reaches top_p; the rest is 0."""
    probs, order = logits_V.softmax(-1).sort(descending=True, stable=True)
    kept = probs.where(probs.cumsum(-1) - probs < top_p, 0.0)
    return torch.zeros_like(probs).scatter(0, order, kept / kept.sum())
