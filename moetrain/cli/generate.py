"""moetrain generate <run> generate.prompt='...' [key=value ...]: continue a text.

By the newest checkpoint of a run, which is named as it is or as run.name= or run.dir=. Its own config is the base;
generate.tokens, .temperature, .top_p and .seed say how to sample; generate.cache=false runs all tokens again for every new one.
"""

from moetrain import launch
from moetrain.config.compose import for_run, run_dir
from moetrain.errors import ConfigError
from moetrain.nodes.foreign import check_ranks


def run(argv: list[str]) -> int:
    config = for_run(argv)
    check_ranks("generate", argv, config)
    if not launch.is_worker() and config.run.nproc > 1:
        return launch.start_ranks(["generate", *argv], config.run.nproc, run_dir(config), record=False)
    if config.data.kind == "synthetic" or config.data.tokenizer == "none":
        raise ConfigError(45, "the run was trained on tokens that stand for no text", where=str(run_dir(config)),
                          why="there is no tokenizer to write with", next="train with data=text, or give data.tokenizer")
    from moetrain.generate.sample import continue_text
    from moetrain.train.evaluate import load_trained

    model, dataset, mesh, _ = load_trained(config)
    wish = config.generate
    text = continue_text(model, dataset.tokenizer, wish.prompt, tokens=wish.tokens, temperature=wish.temperature,
                         top_p=wish.top_p, seed=wish.seed, context=config.train.seq_len, cache=wish.cache,
                         group=mesh["batch"])
    if launch.rank() == 0:
        print(text)
    return 0
