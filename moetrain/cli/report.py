"""moetrain report <run>: draw what a run recorded into <run.dir>/report. <run> is a name or a directory.

    loss.png             training and held-out loss over tokens and steps
    expert_load.png      tokens per expert
    specialisation.png   experts by domain, after an evaluation on two domains or more

Numbers are beside each picture as CSV. Steps that log.timeline recorded are summed up in a table: phases and operators.
"""

from moetrain.config.compose import find_run
from moetrain.errors import ConfigError
from moetrain.files import nearby


def run(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(str(__doc__).strip())
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ConfigError(43, "report takes one run", where="the command line",
                          why=f"it was given {' '.join(argv) or 'nothing'}",
                          next="moetrain report <name or directory of a run>")
    directory = find_run(argv[0].removeprefix("run.name=").removeprefix("run.dir="))
    from moetrain.report.run import draw
    from moetrain.report.timeline import summarize, text

    for path in draw(directory):
        print(nearby(path))
    if rows := summarize(directory):
        print(f"{nearby(directory / 'report' / 'timeline.csv')}\n\n{text(rows)}")
    return 0
