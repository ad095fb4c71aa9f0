"""Format of the step line, which covers all steps since the line before.

    step  1200/10000  12%  loss 3.142 nats lr 2.9e-4 gnorm 0.81 | bal 1.02 maxvio 0.18 dead 0 drop 0.0%
         |  412k tok/s mem 33.1G | 1.27s eta 3h06

docs/reference/output.md explains every word.
"""

from collections.abc import Callable, Mapping, Sequence

from moetrain.units import count, duration, scientific, size

_LAST = {"step", "tokens", "lr", "moe/dead_experts", "memory/peak", "time/slowest_rank", "timestamp"}
_LARGEST = {"grad_norm"}  # so that a spike between two lines is visible
_OWN_WORDS = {"loss/ce", "loss/total", "loss/balance"}


class StepMeans:
    """Accumulator of the metrics of several steps into one record.

    Most metrics are averaged, over the steps that have them. Rates (`throughput/*`) are totals over total
    time, the gradient norm is the largest, and metrics of a state are those of the last step.
    """

    def __init__(self) -> None:
        self._records: list[Mapping[str, float]] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        self._records.append(metrics)

    def take(self) -> dict[str, float]:
        """Return the record of the steps since the last call."""
        records, self._records = self._records, []
        names = dict.fromkeys(name for record in records for name in record)
        return {name: self._of(name, [record for record in records if name in record]) for name in names}

    @staticmethod
    def _of(name: str, records: Sequence[Mapping[str, float]]) -> float:
        values = [record[name] for record in records]
        if name in _LAST:
            return values[-1]
        if name in _LARGEST:
            return max(values, key=lambda value: (value != value, value))  # NaN counts as the largest
        seconds = [record.get("time/step", 0.0) for record in records]
        if name.startswith("throughput/") and sum(seconds) > 0:
            return sum(value * time for value, time in zip(values, seconds)) / sum(seconds)
        return sum(values) / len(values)


def step_line(metrics: Mapping[str, float], steps: int, eta_s: float | None = None) -> str:
    """Format a step line, of fixed width in common ranges; parts without metrics are left out.

    Args:
        metrics: record of the steps.
        steps: number of steps of the run.
        eta_s: estimated seconds left.
    """
    return " | ".join(step_parts(metrics, steps, eta_s))


def step_parts(metrics: Mapping[str, float], steps: int, eta_s: float | None) -> list[str]:
    """Format the parts of a step line, which vertical bars separate.

    Args:
        metrics: record of the steps.
        steps: number of steps of the run.
        eta_s: estimated seconds left.
    """
    step, get = int(metrics["step"]), metrics.get
    parts = [
        [f"step {step:{max(5, len(str(steps)))}d}/{steps} {100 * step // max(steps, 1):3d}% ",
         part("loss {:.3f} nats", get("loss/ce")), part("lr {} ", get("lr"), scientific),
         part("gnorm {:<4.2f}", get("grad_norm"))],
        [part("bal {:.2f}", get("loss/balance")), *_further_losses(metrics),
         part("maxvio {:.2f}", get("moe/max_violation/max")),
         part("dead {:.0f}", get("moe/dead_experts")), part("drop {:.1%}", get("moe/drop_fraction"))],
        [part("{:>5s} tok/s", get("throughput/tokens_per_s"), count),
         part("mfu {:.1%}", get("throughput/mfu")),
         part("mem {}", get("memory/peak"), size)],
        [part("{}", get("time/step"), duration), part("eta {}", eta_s, duration)],
    ]
    return [line for words in parts if (line := " ".join(filter(None, words)).rstrip())]


def _further_losses(metrics: Mapping[str, float]) -> list[str]:
    """Format the further losses of `loss=[...]` by name, without their weights; zeros are left out."""
    return [f"{name.removeprefix('loss/')} {value:.3g}" for name, value in metrics.items()
            if name.startswith("loss/") and name.count("/") == 1 and name not in _OWN_WORDS and value]


def part(form: str, value: float | None, show: Callable[[float], str] | None = None) -> str:
    """Format one value with its word; empty where the value is None.

    Args:
        form: format string.
        value: the value.
        show: converts the value to text first.
    """
    return "" if value is None else form.format(show(value) if show else value)


def fold(parts: Sequence[str], width: int) -> str:
    """Join parts by bars, with line breaks at bars where the terminal is too narrow."""
    lines = [parts[0]]
    for words in parts[1:]:
        if len(lines[-1]) + 3 + len(words) <= width:
            lines[-1] += f" | {words}"
        else:
            lines.append(f"     | {words}")
    return "\n".join(lines)
