"""Speed of `prepare` on one core: text a second of processor time, by form of the source and tokenizer.

    python -m tools.bench.prepare                      # 32 MB a source, three times each: some minutes
    python -m tools.bench.prepare --write              # also its section of docs/results/data.md

The text is words drawn from a vocabulary of 50,000 by Zipf's law, so that no passage comes twice; in
`repeated` every text comes 20 times with another ending, as crawled pages do. The tokenizer.json is a
byte-level BPE of 4,096 tokens, trained on the first megabyte. Every preparation runs in a process of its own,
with one thread. Its processor time counts, not the clock; of the repetitions the least is what it takes on a
quiet machine. Before it the same process lets the tokenizers library encode the texts of plain files in one
batch, which is what a preparation with a tokenizer.json is compared with.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from tools.result_page import ROOT, provenance, write_section

PAGE = ROOT / "docs" / "results" / "data.md"
GOAL_OF_LIBRARY = 0.8
GOAL = 8.0                      # MB/s of text without repetition, bytes as tokens


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="bench_prepare-") as folder:
        rows = list(compare(Path(folder), options))
    result = table(rows)
    print(result)
    if options.write:
        write_section(PAGE, "Preparing", section(result, rows, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=32, help="of text in a source")
    parser.add_argument("--repeats", type=int, default=3, help="preparations of each source")
    parser.add_argument("--only", default="", help="sources whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--measure", nargs=3, metavar=("PATH", "TOKENIZER", "OVERLAP"),
                        help=argparse.SUPPRESS)
    return parser.parse_args()


@cache
def vocabulary() -> list[bytes]:
    """The 50,000 words, of 2 to 10 letters."""
    chance = np.random.default_rng(0)
    letters = chance.integers(97, 123, (50_000, 10), np.uint8)
    lengths = chance.integers(2, 11, 50_000)
    return [letters[number, :length].tobytes() for number, length in enumerate(lengths)]


def text(seed: int, size: int) -> bytes:
    """Lines of random words, `size` bytes or a little more."""
    chance, words, lines = np.random.default_rng(seed), vocabulary(), []
    while size > 0:
        numbers = (chance.zipf(1.2, 100) % 50_000).tolist()
        lines.append(b" ".join([words[number] for number in numbers]) + b"\n")
        size -= len(lines[-1])
    return b"".join(lines)


def make_files(folder: Path, size: int) -> None:
    for number in range(size // 10_000):
        (folder / f"{number % 5}").mkdir(exist_ok=True)
        (folder / f"{number % 5}" / f"{number}.txt").write_bytes(text(number, 10_000))


def make_book(folder: Path, size: int) -> None:
    (folder / "book.txt").write_bytes(text(0, size))


def make_repeated(folder: Path, size: int) -> None:
    texts = [text(number, 5_000) for number in range(-(-size // 100_000))]
    for number in range(size // 5_000):
        (folder / f"{number}.txt").write_bytes(texts[number % len(texts)] + b"%d\n" % number)


def lines(size: int) -> bytes:
    return b"".join(json.dumps({"text": text(number, 2_000).decode()}).encode() + b"\n"
                    for number in range(size // 2_000))


def make_lines(folder: Path, size: int) -> None:
    (folder / "texts.jsonl").write_bytes(lines(size))


def make_gzip(folder: Path, size: int) -> None:
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines(size), 6))


def make_zstd(folder: Path, size: int) -> None:
    from backports import zstd

    (folder / "texts.jsonl.zst").write_bytes(zstd.compress(lines(size)))


SOURCES: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "files": ("files of 10 kB, five folders", make_files), "book": ("one file", make_book),
    "lines": ("JSON lines of 2 kB", make_lines), "gz": ("the same, .gz", make_gzip),
    "zst": ("the same, .zst", make_zstd), "repeated": ("files of 5 kB, repeated", make_repeated)}


def train_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator([text(0, 1 << 20).decode()], trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    library.save(str(path))
    return path


def compare(folder: Path, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of results, one for each source and tokenizer. The preparations of all of them take turns."""
    bpe = str(train_tokenizer(folder / "tokenizer.json"))
    cases = [(name, tokenizer, overlap) for name in SOURCES if options.only in name
             for tokenizer, overlap in (("bytes", 1_000_000), ("bytes", 0), (bpe, 1_000_000))]
    for name in dict.fromkeys(name for name, _, _ in cases):
        (folder / name).mkdir()
        SOURCES[name][1](folder / name, int(options.megabytes * 1e6))
    found: dict[tuple, list[dict]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for case, runs in found.items():
            command = [sys.executable, "-m", "tools.bench.prepare", "--measure", str(folder / case[0]),
                       case[1], str(case[2])]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={
                **os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            runs.append(json.loads(done.stdout))
    for (name, tokenizer, overlap), runs in found.items():
        rates = [run["bytes"] / run["seconds"] / 1e6 for run in runs]
        yield {"source": SOURCES[name][0], "tokenizer": "BPE" if tokenizer == bpe else "bytes",
               "overlap": overlap, "best": max(rates), "median": statistics.median(rates),
               "of_library": of_library(runs)}


def of_library(runs: list[dict]) -> float | None:
    """Speed of the preparation over that of the library's own encoding, both at their best."""
    if runs[0]["library"] is None:
        return None
    return min(run["library"] for run in runs) / min(run["seconds"] for run in runs)


def measure(path: str, tokenizer: str, overlap: str) -> dict:
    """Prepare one source in this process, and return bytes, seconds and the library's seconds.

    Args:
        path: folder of the source.
        tokenizer: `bytes` or a tokenizer.json.
        overlap: places of held-out text that are looked up.
    """
    from moetrain.data.preparation.prepare import prepare
    from moetrain.data.preparation.prepared_dataset import open_prepared, total

    library = library_seconds(Path(path), tokenizer)
    out = Path(tempfile.mkdtemp(prefix="out-", dir=Path(path).parent))
    start = time.process_time()
    folder = prepare(path=path, out=out, tokenizer=tokenizer, overlap=int(overlap))
    seconds = time.process_time() - start
    described = open_prepared(folder, verify=False).description
    shutil.rmtree(out)
    size = sum(total(described[split])["bytes"] for split in ("train", "heldout"))
    return {"bytes": size, "seconds": seconds, "library": library}


def library_seconds(path: Path, tokenizer: str) -> float | None:
    """Seconds of the library's own batch encoding; None for bytes, and for files that hold several texts."""
    if tokenizer == "bytes" or any(".jsonl" in file.name for file in path.iterdir()):
        return None
    from tokenizers import Tokenizer

    texts = [file.read_text() for file in sorted(path.rglob("*.txt"))]
    library = Tokenizer.from_file(tokenizer)
    start = time.process_time()
    sum(len(encoded.ids) for encoded in library.encode_batch(texts, add_special_tokens=False))
    return time.process_time() - start


def table(rows: list[dict]) -> str:
    head = ("source", "tokenizer", "overlap measured", "MB/s, best", "median", "of the library's")
    cells = [(row["source"], row["tokenizer"], "yes" if row["overlap"] else "no", f"{row['best']:.1f}",
              f"{row['median']:.1f}", "" if row["of_library"] is None else f"{row['of_library']:.2f}")
             for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells))


def section(result: str, rows: list[dict], options: argparse.Namespace) -> str:
    encoded = [row["of_library"] for row in rows if row["of_library"] is not None]
    plain = [row["best"] for row in rows
             if row["tokenizer"] == "bytes" and row["overlap"] and "repeated" not in row["source"]]
    return f"""\
`moetrain data prepare` on words drawn from a vocabulary of 50,000 by Zipf's law, so that passages do not
repeat. In the repeated source every text appears 20 times with different endings. BPE is a byte-level
tokenizer.json of 4,096 tokens. Every preparation runs in a process of its own with one thread. MB/s are bytes
of text per second of processor time: the best of {options.repeats} repetitions, and their median.

{result}

Text without repetition is prepared at {min(plain):.1f} to {max(plain):.1f} MB/s with bytes as tokens and the
overlap measured (target: {GOAL:g}). With a tokenizer.json the speed is {min(encoded):.2f} to
{max(encoded):.2f} of that at which the tokenizers library encodes all texts in one batch (target:
{GOAL_OF_LIBRARY:g}), although it includes reading, removal of duplicates, overlap and writing. The reason is
that texts are encoded in batches, without offsets where these are not needed.

{provenance()}"""


if __name__ == "__main__":
    main()
