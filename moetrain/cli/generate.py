"""moetrain generate run.name=<name> generate.prompt='...' [key=value ...]: continue a text.

By the newest checkpoint of a run. The run's own config is the base; generate.tokens, .temperature, .top_p and .seed
say how to sample.
"""

from moetrain import launch
from moetrain.config.compose import for_run, run_dir


def run(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(str(__doc__).strip())
        return 0
    config = for_run(argv)
    if config.run.nproc > 1 and not launch.is_worker():
        return launch.start_ranks(["generate", *argv], config.run.nproc, run_dir(config), record=False)
    from moetrain.generate.sample import generate_run

    text = generate_run(config)
    if launch.rank() == 0:
        print(text)
    return 0
