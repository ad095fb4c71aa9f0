"""The model card of an exported folder: README.md with what a reader wants to know before loading it.

Front matter as the Hugging Face hub reads it, how to load, sizes, data, figures of the run, balance with the
picture of tokens per expert, and the result of the export's own check. Paths of this machine are left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from moetrain.config.layer_pattern import sparse_layers
from moetrain.config.schema import Config
from moetrain.files import read_json
from moetrain.report.loss import records
from moetrain.units import decimal

PICTURES = {"expert_load.png": "Tokens per expert, over the mean of their router",
            "specialisation.png": "Experts by domain", "loss.png": "Training and held-out loss"}


class CardFacts(Protocol):
    """What the card is written from: run_export.CardFacts."""

    name: str
    config: Config
    run_dir: Path
    architecture: str
    check: dict[str, Any]
    step: int
    tokens: int
    parameters: tuple[int, int]
    vocab_size: int
    context: int
    imported: dict[str, Any] | None
    pictures: list[str]


def pictures(run_dir: Path) -> list[Path]:
    """List the pictures of a run that its card shows, as `moetrain report` or the end of training drew them.

    Args:
        run_dir: directory of the run.
    """
    return [run_dir / "report" / name for name in PICTURES if (run_dir / "report" / name).is_file()]


def model_card(facts: CardFacts) -> str:
    """Write the card, as Markdown.

    Args:
        facts: what is known of model, run and export.
    """
    parts = [_front_matter(facts), _introduction(facts), _loading(facts), _sizes(facts), _training(facts),
             _figures(facts), _balance(facts), _check(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> str:
    return "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:",
                      "- mixture-of-experts", f"- {facts.check['family']}", "- moetrain", "---"])


def _introduction(facts: CardFacts) -> str:
    total, active = facts.parameters
    text = (f"# {facts.name}\n\nA sparse Mixture-of-Experts language model of {decimal(total)} parameters, "
            f"of which a token uses {decimal(active)}. It is a `{facts.architecture}`, written by moetrain "
            f"{facts.check['moetrain']}.")
    if facts.imported is not None:
        name = facts.imported.get("_name_or_path")
        text += " It began from public weights" + (f" (`{name}`)." if name else ".")
    return text


def _loading(facts: CardFacts) -> str:
    return f'''## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{facts.name}")
tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

No code of this folder is run. Tokenizer: {facts.check["tokenizer"]}. `moetrain generate` puts the id that
ends a document before the prompt, as it stands before each document in training.'''


def _sizes(facts: CardFacts) -> str:
    sizes, (total, active) = facts.config.model, facts.parameters
    tensors = facts.check["tensors"]
    shared = f", {sizes.num_shared_experts} shared" if sizes.num_shared_experts else ""
    rows = {"parameters": f"{total:,}, {active:,} of them for a token",
            "layers": f"{sizes.num_layers}, {len(sparse_layers(sizes))} with experts",
            "width": sizes.dim,
            "heads": f"{sizes.num_heads}, {sizes.num_kv_heads or sizes.num_heads} of keys and values",
            "experts of a layer": f"{sizes.num_experts}, {sizes.top_k} for a token{shared}",
            "width of an expert": sizes.expert_dim, "vocabulary": f"{facts.vocab_size:,}",
            "positions": f"{facts.context:,}",
            "weights": f"{facts.check['dtype']}, {decimal(tensors['bytes'], 'B')} in {tensors['files']} "
                       f"file{'s' * (tensors['files'] > 1)}"}
    return _table("Sizes", rows)


def _training(facts: CardFacts) -> str:
    if not facts.tokens:
        return ""
    config, data = facts.config, facts.config.data
    name = Path(data.path).name if data.path else "moetrain's built-in corpus: text of Python packages"
    rows: dict[str, Any] = {
        "data": "generated tokens" if data.kind == "synthetic" else name,
        "tokens": f"{facts.tokens:,} in {facts.step:,} steps of {config.train.global_batch} sequences of "
                  f"{config.train.seq_len}",
        "optimizer": f"{config.optim.name}, peak rate {config.optim.lr:g}, {config.optim.schedule}",
        "precision": config.run.dtype}
    try:
        seen = read_json(facts.run_dir / "env.json")["data"]
        rows["fingerprint of the data"] = f"`{seen[:16]}`"
    except (OSError, ValueError, LookupError, TypeError):
        pass
    if config.init.digest:
        rows["began from"] = f"weights `{str(config.init.digest)[:12]}`"
    return _table("Data and training", rows)


def _figures(facts: CardFacts) -> str:
    steps = records(facts.run_dir / "metrics.jsonl", "step", "loss/ce")
    held = [found for found in records(facts.run_dir / "eval.jsonl", "step", "loss/mean")
            if found["step"] <= facts.step and "command" not in found]
    rows: dict[str, Any] = {}
    if own := [found for found in steps if found["step"] <= facts.step]:
        rows[f"training loss, step {own[-1]['step']}"] = f"{own[-1]['loss/ce']:.4f} nats a token"
    for name, loss in (held[-1].items() if held else ()):
        if name.startswith("loss/"):
            domain = name.removeprefix("loss/")
            in_bytes = held[-1].get(f"nats_per_byte/{domain}")
            rows[f"held-out loss, {domain}, step {held[-1]['step']}"] = f"{loss:.4f} nats a token" + (
                f", {in_bytes:.4f} nats a byte" if in_bytes is not None else "")
    text = _table("Figures", rows) if rows else ""
    return text + _pictures(facts, ("loss.png",)) if text else ""


def _balance(facts: CardFacts) -> str:
    steps = [found for found in records(facts.run_dir / "metrics.jsonl", "step", "moe/max_violation/mean")
             if found["step"] <= facts.step]
    if not steps:
        return ""
    last, balance = steps[-1], facts.config.balance
    weight = balance.get("weight")
    rows = {"balance loss": f"{balance.get('_target_', 'none').rpartition('.')[2]}"
                            + (f", weight {weight:g}" if isinstance(weight, (int, float)) else ""),
            "heaviest expert over the mean, minus 1":
                f"{last['moe/max_violation/mean']:.3f} in the mean of the routers, step {last['step']}",
            "experts without a token in that step": f"{last.get('moe/dead_experts', 0):g}",
            "dropped tokens": f"{last.get('moe/drop_fraction', 0):.2%}"}
    return _table("Balance", rows) + _pictures(facts, ("expert_load.png", "specialisation.png"))


def _check(facts: CardFacts) -> str:
    logits, tensors = facts.check["logits"], facts.check["tensors"]
    rows = {"tensors": f"all {tensors['read']:,} of the checkpoint are in the {tensors['written']:,} here"}
    if "not_compared" in logits:
        rows["logits"] = f"not compared: {logits['not_compared']}"
    else:
        sequences, length = logits["tokens"]
        rows["logits"] = (f"transformers {logits['version']} and moetrain differ by "
                          f"{logits['max_abs_delta']:.2g} at most, where the largest is "
                          f"{logits['max_abs_logit']:.3g}: {sequences} sequences of {length} tokens, "
                          f"{logits['text']}, in float32")
    return _table("Checked when it was written", rows) + "\n\n`export_check.json` has the figures."


def _pictures(facts: CardFacts, names: tuple[str, ...]) -> str:
    return "".join(f"\n\n![{PICTURES[name]}]({name})" for name in names if name in facts.pictures)


def _table(title: str, rows: dict[str, Any]) -> str:
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *_cells(rows)])


def _cells(rows: dict[str, Any]) -> Iterator[str]:
    for name, value in rows.items():
        yield f"| {_plain(name)} | {_plain(str(value))} |"


def _plain(text: str) -> str:
    """Escape what ends a cell."""
    return text.replace("|", "\\|").replace("\n", " ")
