"""moetrain generate <run> generate.prompt='...' [--json] [key=value ...]: continue a text.

<run> is a name or a directory, as it is or as run.name= or run.dir=. Its newest checkpoint continues the
text, its own config is the base, and its own tokenizer reads and writes. generate.tokens, .temperature,
.top_p and .seed say how to sample; generate.cache=false runs all tokens again for every new one. The text
appears as it is sampled. --json prints one object at the end: prompt, text, tokens, ended. A model whose
routers look at later tokens writes only if eval.allow_noncausal=true is said here, whatever the run has.
"""

import json
import sys
from dataclasses import replace

from moetrain.config.compose import for_run, run_dir, typed_keys
from moetrain.config.schema import Config
from moetrain.errors import ConfigError
from moetrain.launch.foreign_ranks import check_ranks
from moetrain.launch.local import start_ranks
from moetrain.launch.program import Program
from moetrain.launch.rank import is_worker, rank

_NONCAUSAL = "eval.allow_noncausal"


def run(argv: list[str], program: Program) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    words = [word for word in argv if word != "--json"]
    config = for_run(words)
    check_ranks("generate", argv, config)
    if not is_worker() and config.run.nproc > 1:
        return start_ranks(["generate", *argv], config.run.nproc, run_dir(config), record=False,
                           program=program)
    if config.data.kind == "synthetic" or config.data.tokenizer == "none":
        raise ConfigError(
            45, "the run was trained on tokens that stand for no text", where=str(run_dir(config)),
            why="there is no tokenizer to write with",
            next="train with data=text, or give data.tokenizer")
    _generate(config, program, typed_keys(words), as_json=len(words) < len(argv))
    return 0


def _generate(config: Config, program: Program, typed: frozenset[str], *, as_json: bool) -> None:
    from moetrain.generate.sample import continue_text, noncausal_capacities
    from moetrain.train.evaluation.trained import choose_tokenizer, load_trained

    if _NONCAUSAL not in typed:  # the run's own allows its training and evaluation to look ahead
        config = replace(config, eval=replace(config.eval, allow_noncausal=False))
    run = load_trained(config, typed, program.convert_model)
    tokenizer, end_id = choose_tokenizer(run, config, typed)
    wanted = config.generate
    warnings = [*map(str, run.changed), *(
        f"capacity {capacity}: it counts the tokens of a whole window in training, and those written so far "
        "here, so other choices may be dropped" for capacity in noncausal_capacities(run.model))]
    for warning in warnings if rank() == 0 else []:
        print(f"[warn] {warning}", file=sys.stderr)
    continuation = continue_text(
        run.model, tokenizer, wanted.prompt, end_id=end_id, tokens=wanted.tokens,
        temperature=wanted.temperature, top_p=wanted.top_p, seed=wanted.seed, run_seed=run.config.run.seed,
        step=run.step, context=config.train.seq_len, cache=wanted.cache,
        mask_documents=run.config.data.mask_documents, group=run.mesh["batch"])
    if rank() != 0:
        "".join(continuation)  # all ranks sample it together
    elif as_json:
        text = "".join(continuation)
        record = {"step": run.step, "prompt": wanted.prompt, "text": text, "tokens": continuation.tokens,
                  "ended": continuation.ended}
        print(json.dumps(record, ensure_ascii=False))
    else:
        print(wanted.prompt, end="", flush=True)
        try:
            for piece in continuation:
                print(piece, end="", flush=True)
        finally:  # after Ctrl-C too, so that the shell begins a new line
            print(flush=True)
