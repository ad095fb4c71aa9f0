"""Text from a trained model: temperature and nucleus (top-p) sampling.

Every new token runs the last `train.seq_len` tokens through the model again; a cache of keys and values comes with later
work. Routers are in evaluation mode. The same seed gives the same text.
"""

import torch
from torch import Tensor

from moetrain.config.compose import run_dir
from moetrain.config.schema import Config
from moetrain.data.loader import TokenDataset
from moetrain.errors import ConfigError
from moetrain.model.transformer import Transformer
from moetrain.routers.base import RouterContext
from moetrain.train.evaluate import load_trained


def generate_run(config: Config) -> str:
    """Prompt and continuation, from the newest checkpoint of the run."""
    options = config.generate
    model, dataset, mesh, _ = load_trained(config)
    if not isinstance(dataset, TokenDataset):
        raise ConfigError(
            91, "the run was trained on synthetic tokens, which stand for no text", where=str(run_dir(config)),
            why="there is no tokenizer to write with", next="train with data=text",
        )
    tokenizer = dataset.tokenizer
    ids = [tokenizer.end_id, *(int(i) for i in tokenizer.encode(options.prompt.encode()))]
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.tensor(ids, device=mesh.device)
    for _ in range(options.tokens):
        chosen = next_token(model, tokens[-config.train.seq_len :], options.temperature, options.top_p, generator)
        if chosen == tokenizer.end_id:
            break
        tokens = torch.cat([tokens, tokens.new_tensor([chosen])])
    return tokenizer.decode(tokens[1:].tolist())


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
