"""moetrain eval run.name=<name> [key=value ...]: evaluate a run's newest checkpoint on held-out text, per domain.

The run's own config is the base. eval.windows sets how much text; eval.ngram=3 prints n-gram models beside it.
"""

from moetrain import launch
from moetrain.config.compose import for_run, run_dir


def run(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(str(__doc__).strip())
        return 0
    config = for_run(argv)
    if config.run.nproc > 1 and not launch.is_worker():
        return launch.start_ranks(["eval", *argv], config.run.nproc, run_dir(config), record=False)
    from moetrain.train.evaluate import evaluate_run

    evaluate_run(config)
    return 0
