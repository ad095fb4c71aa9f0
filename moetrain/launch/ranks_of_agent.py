"""Find the ranks of a torchrun agent in /proc: torchrun does not publish their process ids."""

from contextlib import suppress
from pathlib import Path


def ranks_of(agent: int) -> set[int]:
    """Process ids of the ranks: children of the agent that lead a session of their own."""
    every = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {process for process in every if parent_of_leader(process) == agent}


def parent_of_leader(process: int) -> int | None:
    """The parent of a process that leads a session; None when it does not, or has ended."""
    with suppress(OSError):
        state, parent, _, session = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[:4]
        if int(session) == process and state != "Z":
            return int(parent)
    return None
