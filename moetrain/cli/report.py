"""moetrain report <run>: draw tokens per expert, and experts by domain, into <run.dir>/report. <run> is a name or a directory."""

from moetrain.config.compose import find_run
from moetrain.errors import ConfigError


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

    draw(directory)
    return 0
