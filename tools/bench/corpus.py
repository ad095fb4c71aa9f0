"""Costs of a corpus of any size: memory of `prepare`, speed of reading, time of evaluation by domains.

    python -m tools.bench.corpus reading            # seconds
    python -m tools.bench.corpus domains            # two minutes
    python -m tools.bench.corpus memory             # 5 GB, three times: half an hour, and 70 GB of disk
    python -m tools.bench.corpus memory --write     # also its section of docs/results/data.md

Text is words drawn from a vocabulary of 50,000 by Zipf's law; of a large corpus 2,000 passages of 2 kB come
again and again, each time behind another number. Memory is the largest resident set of the process, which
`wait4` tells. Reading is what `data inspect` does: every document is found, hashed and, where it cannot be
read again from its file, kept in a temporary file.
"""

import argparse
import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import count, islice
from pathlib import Path

from tools.bench.prepare import text
from tools.result_page import ROOT, provenance, write_section

PAGE = ROOT / "docs" / "results" / "data.md"
PASSAGES, PASSAGE = 2_000, 2_000                     # how many, and bytes of each
# A process of its own between, because the kernel counts what the parent had at the fork.
RESIDENT = ("import os, subprocess, sys; done = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0); "
            "print(done[2].ru_maxrss); sys.exit(done[1] != 0)")
AIM_GB = 1.0                                         # resident
AIM_DOMAINS = 1.5                                    # times as long for 2,000 domains as for 10


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="bench_corpus-", dir=options.folder) as folder:
        measure = {"reading": reading, "memory": memory, "domains": domains}[options.what]
        title, result = measure(Path(folder), options)
    print(result)
    if options.write:
        write_section(PAGE, title, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reading", "memory", "domains"])
    parser.add_argument("--gigabytes", type=float, default=5, help="of text, for memory")
    parser.add_argument("--megabytes", type=float, default=100, help="of text, for reading")
    parser.add_argument("--repeats", type=int, default=3, help="for reading and domains")
    parser.add_argument("--only", default="", help="sources whose name contains this")
    parser.add_argument("--folder", default=None, help="where there is room")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    return parser.parse_args()


def documents(size: float) -> Iterator[str]:
    """Texts of 2 kB, no two the same."""
    passages = [text(number, PASSAGE).decode() for number in range(PASSAGES)]
    for number in range(int(size // PASSAGE)):
        yield f"{number} {passages[number * 7919 % PASSAGES]}"


def make_lines(folder: Path, size: float) -> None:
    with open(folder / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents(size))


def make_gzip(folder: Path, size: float) -> None:
    with gzip.open(folder / "texts.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents(size))


def make_text(folder: Path, size: float) -> None:
    with open(folder / "book.txt", "w") as file:
        file.writelines(documents(size))


def make_csv(folder: Path, size: float) -> None:
    with open(folder / "texts.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(documents(size)))


def make_parquet(folder: Path, size: float) -> None:
    import pyarrow
    import pyarrow.parquet

    schema, found = pyarrow.schema([("text", pyarrow.string())]), documents(size)
    with pyarrow.parquet.ParquetWriter(folder / "texts.parquet", schema) as writer:
        while rows := list(islice(found, 10_000)):
            writer.write_table(pyarrow.table({"text": rows}, schema))


def make_files(folder: Path, size: float) -> None:
    """Write files of five documents each."""
    found = documents(size)
    for number in count():
        if not (some := "".join(islice(found, 5))):
            return
        place = folder / f"{number // 1000:04d}"
        place.mkdir(exist_ok=True)
        (place / f"{number}.txt").write_text(some)


FORMATS: dict[str, Callable[[Path, float], None]] = {
    "one file of text": make_text, "JSON lines of 2 kB": make_lines, "the same, .gz": make_gzip,
    "CSV": make_csv, "Parquet": make_parquet}


def reading(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Measure the speed of reading by format; title and text of the section."""
    from moetrain.data.corpus.selection import find_source, select
    from moetrain.data.reading.spool import Spool

    rows = []
    for number, (name, make) in enumerate(FORMATS.items()):
        if options.only not in name:
            continue
        place = folder / str(number)
        place.mkdir()
        make(place, options.megabytes * 1e6)
        rates = []
        for _ in range(options.repeats):
            start = time.process_time()
            with Spool(folder / "spool") as spool:
                found = select(find_source(str(place), None), spool, share=Fraction(1, 20))
            rates.append(found.parts.train.bytes + found.parts.heldout.bytes)
            rates[-1] /= 1e6 * (time.process_time() - start)
        rows.append((name, f"{max(rates):.0f}", f"{statistics.median(rates):.0f}"))
    return "Reading", f"""\
MB of text per second of processor time of one core, the best of {options.repeats} repetitions and their \
median. Reading finds, decodes, hashes and selects every document; documents that are not in plain-text \
files are stored in a temporary file for the second pass.

{table(("format", "MB/s, best", "median"), rows)}

{provenance()}"""


def memory(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Measure the resident memory of preparations; title and text of the section."""
    cases = {"JSON lines of 2 kB": make_lines, "one file of text": make_text, "files of 10 kB": make_files}
    chosen = {name: make for name, make in cases.items() if options.only in name}
    # Each in a process of its own: memory is not shared.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(
            lambda name: prepared(folder / name, name, chosen[name], options.gigabytes * 1e9), chosen))
    cells = [(row["name"], f"{row['documents']:,}", f"{row['bytes'] / 1e9:.2f}",
              f"{row['resident'] / 1e9:.2f}", f"{row['seconds']:.0f}") for row in rows]
    largest = max(row["resident"] for row in rows) / 1e9
    return "Memory", f"""\
The largest resident set of `moetrain data prepare` with bytes as tokens and the overlap measured: at most \
{largest:.2f} GB (target: below {AIM_GB:g}). One preparation runs on each core at the same time. Only the \
records of documents, 150 to 200 bytes each while they are sorted, and of files, 600 bytes each, grow with \
the corpus.

{table(("source", "documents", "GB of text", "GB resident", "s"), cells)}

{provenance()}"""


def prepared(place: Path, name: str, make: Callable[[Path, float], None], size: float) -> dict:
    """Prepare one source in a process of its own, and return what it took.

    Args:
        place: folder of source and result, removed afterwards.
        name: name of the row.
        make: writes the source into a folder.
        size: bytes of text.
    """
    (place / "in").mkdir(parents=True)
    make(place / "in", size)
    command = [sys.executable, "-m", "moetrain", "data", "prepare", f"data.path={place / 'in'}",
               f"data.cache={place / 'out'}", "data.tokenizer=bytes", "log.progress=false"]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RESIDENT, *command], cwd=place, stdout=subprocess.PIPE,
                          text=True, env=environment)
    assert done.returncode == 0, done.stdout
    described = json.loads(next((place / "out").glob("*/dataset.json")).read_text())
    became = described["account"]["text"]
    subprocess.run(["rm", "-rf", place], check=True)
    row = {"name": name, "documents": became["documents"], "bytes": became["bytes"],
           "resident": int(done.stdout.split()[-1]) * 1024, "seconds": time.perf_counter() - start}
    print(row, file=sys.stderr)
    return row


def domains(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Evaluate the same text as 10 domains and as 2,000, in turns; title and text of the section.

    The windows of a part are chosen so that both evaluations have as many in all.
    """
    size, asked, seconds = 2_000, {10: 200, 2_000: 2_000}, {10: [], 2_000: []}
    for number in seconds:
        for document in range(size):
            place = folder / str(number) / "in" / f"d{document % number:04d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{document}.txt").write_bytes(text(document, 1_500))
        run(folder / str(number), "train", "experiment=quickstart", "data.path=in",
            "data.held_out_share=0.5", "run.steps=1", "eval.windows=1")
    for _ in range(options.repeats):
        for number, found in seconds.items():
            run(folder / str(number), "eval", f"eval.windows={asked[number]}")
            lines = (folder / str(number) / "runs" / "bench" / "eval.jsonl").read_text().splitlines()
            found.append(json.loads(lines[-1])["time/eval"])
    rows = [(f"{number:,}", windows := measured(folder / str(number), asked[number]), f"{min(found):.2f}",
             1000 * min(found) / windows) for number, found in seconds.items()]
    ratio = rows[1][3] / rows[0][3]
    cells = [(*row[:3], f"{row[3]:.2f}") for row in rows]
    return "Evaluation of many domains", f"""\
Time of `moetrain eval` for the quickstart's model on 2,000 documents of 1.5 kB, half of each held out, \
divided into 10 and into 2,000 domains; the best of {options.repeats}. A window takes {ratio:.2f} times as \
long with 2,000 domains as with 10 (target: at most {AIM_DOMAINS:g}).

{table(("domains", "windows", "s", "ms a window"), cells)}

{provenance()}"""


def measured(folder: Path, windows: int) -> int:
    """Number of windows that an evaluation of the run reads."""
    import yaml

    from moetrain.data.batches.token_dataset import TokenDataset
    from moetrain.data.preparation.prepared_dataset import open_prepared

    config = yaml.safe_load((folder / "runs" / "bench" / "config.yaml").read_text())
    (prepared,) = (path.parent for path in folder.glob("runs/bench/data/*/dataset.json"))
    dataset = TokenDataset(prepared=open_prepared(prepared, verify=False),
                           seq_len=config["train"]["seq_len"], global_batch=1, seed=0, trains=False)
    return sum(len(dataset.heldout_ids(part, windows)) for part in range(len(dataset.measured)))


def run(folder: Path, verb: str, *words: str) -> None:
    command = [sys.executable, "-m", "moetrain", verb, "run.name=bench", "log.progress=false", *words]
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                   stdout=subprocess.DEVNULL)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    main()
