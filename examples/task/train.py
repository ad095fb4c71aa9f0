"""Two tasks in one file of records, with one expert in common."""

import json
import sys
from pathlib import Path

from examples.choices import print_choices
from moetrain.config.compose import compose
from moetrain.train.loop import train


def main(out: Path) -> dict[str, list[int]]:
    """Write the records, train below `out`, and return the held-out choices by task."""
    out.mkdir(parents=True, exist_ok=True)
    records = [{"task": task, "text": text} for number in range(600) for task, text in (
        ("count", f"{number}, {number + 1}, {number + 2}\n"),
        ("reverse", f"{number * 37} = {str(number * 37)[::-1]}\n"))]
    (out / "tasks.jsonl").write_text("\n".join(map(json.dumps, records)))
    train(compose([
        "experiment=debug", "data=text", f"data.path={out / 'tasks.jsonl'}", "data.domain_key=task",
        f"run.dir={out / 'run'}", "run.steps=4",
        "model.num_experts=5", "router=domain", "router.experts=[[0,1,2],[0,3,4]]",      # count, reverse
    ]))
    return print_choices(out / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
