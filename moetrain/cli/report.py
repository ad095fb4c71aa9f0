"""moetrain report <run>: draw the records of a run into <run.dir>/report.

    loss.png             training and held-out loss over tokens and steps
    expert_load.png      tokens per expert
    specialisation.png   experts by domain, after an evaluation on two domains or more
    routing_*.png        what experts are chosen for, after evaluations with log.routing=true

Numbers are beside each picture as CSV. Steps that log.timeline recorded are summed up in a table: phases and
operators.

<run> is a name or a directory, as it is or as run.name= or run.dir=.
"""

from moetrain.config.run_names import find_run, reference
from moetrain.errors import ConfigError
from moetrain.files import nearby


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    name = reference(argv[0]) if len(argv) == 1 else None
    if name is None:
        raise ConfigError(43, "report takes one run", where="the command line",
                          why=f"it was given {' '.join(argv) or 'nothing'}",
                          next="moetrain report <name or directory of a run>")
    directory = find_run(name)
    from moetrain.report.run import draw
    from moetrain.report.timeline import summarize, text

    for path in draw(directory):
        print(nearby(path))
    if rows := summarize(directory):
        print(f"{nearby(directory / 'report' / 'timeline.csv')}\n\n{text(rows)}")
    return 0
