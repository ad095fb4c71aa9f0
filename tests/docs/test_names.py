"""Files, links, keys and metrics that pages name exist.

Pages in docs/results/ tell of their day, so only their links are followed.
"""

import re
from pathlib import Path

import pytest

from moetrain.cli.help import keys_of
from moetrain.config.groups import group_options, section_of
from moetrain.config.values import schema_keys, schema_sections

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
OF_TODAY = [page for page in PAGES if page.parent.name != "results"]
# Where a path in backticks may begin: the root of the repository or, in explanations, the package or the
# tests.
BASES = (ROOT, ROOT / "moetrain", ROOT / "tests")
# Files that readers make.
THEIRS = {"moetrain/losses/sureness.py", "conf/loss/sureness.yaml", "moetrain/routers/softplus.py",
          "conf/router/softplus.yaml", "moetrain/moe/squared_relu.py", "conf/expert/squared_relu.yaml",
          "moetrain/moe/last_capacity.py", "conf/capacity/last.yaml", "moetrain/plan/planners/hottest.py",
          "conf/planner/hottest.yaml",
          "runs/big/job.sbatch"}
TENSORS = re.compile(r"model\.(layers|mtp|embed|head|norm)\b")          # names in a checkpoint, not keys
FOLDERS = {path.name for base in BASES for path in base.iterdir() if path.is_dir()}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """What stands in backticks, outside of blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text_of(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for code in code_of(page):
        found = re.fullmatch(r"((\w+)/[\w./-]+\.(?:py|sh|md|yaml|cu|sbatch))(?:::\w+)?", code)
        if found and found[2] in FOLDERS and found[1] not in THEIRS:
            assert any((base / found[1]).is_file() for base in (*BASES, page.parent)), code


def known_keys() -> set[str]:
    return {*schema_keys(), *(key.path for section in schema_sections() for key in keys_of(section))}


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_keys_that_are_named_exist(page: Path) -> None:
    keys, sections = known_keys(), {*schema_sections(), *map(section_of, group_options())}
    a_file = re.compile(r"\.(py|sh|md|yaml|jsonl?|npz|npy|png|csv|log|txt|bin|idx)$")
    for code in code_of(page):
        found = re.fullmatch(r"((\w+)(?:\.\w+)+)(?:=.*)?", code)
        if not found or found[2] not in sections or TENSORS.match(code) or a_file.search(found[1]):
            continue
        whole_or_part = found[1] in keys or any(key.startswith(f"{found[1]}.") for key in keys)
        mappings = ("data.weights", "denoising.rates", "model.rope_scaling")
        entry = found[1].rpartition(".")[0] in mappings
        assert whole_or_part or entry or found[1].endswith("._target_"), code


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_options_that_are_named_exist(page: Path) -> None:
    options = group_options()
    for code in code_of(page):
        found = re.fullmatch(r"(\w+)=(\w+)", code)
        if found and found[1] in options:
            assert found[2] in (*options[found[1]], "null", "none"), code


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_metrics_that_are_named_exist(page: Path) -> None:
    """files.md has all of them, and is compared with a run."""
    known = re.findall(r"`((?:loss|nats_per_byte|moe|time|throughput|memory)/[^`]+)`",
                       text_of(ROOT / "docs/reference/files.md"))
    escaped = [re.escape(name).replace(r"\<", "<").replace(r"\>", ">") for name in known]
    patterns = [re.compile(re.sub(r"<\w+>", r"[\\w<>]+", name)) for name in escaped]
    for code in code_of(page):
        if re.fullmatch(r"(?:loss|moe|time|throughput|memory)/[\w/<>]+", code):
            assert any(pattern.fullmatch(code) for pattern in patterns), code
