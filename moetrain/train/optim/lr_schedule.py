"""Learning-rate schedule: a pure function of the step, without state. Imports no torch."""

import math

from moetrain.config.schema import OptimConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of a step: a linear warm-up to lr, then a decay to lr * min_lr_ratio at the last step.

    cosine   decays from the end of the warm-up
    wsd      warm-up, stable, decay: stays at lr and decays over the last `decay` share of the steps. Only
             these depend on `steps`, so a run that stopped before them and is resumed with more steps equals
             a run that was started with more.

    Args:
        step: number of the step, from 1.
        steps: number of steps of the run.
        optim: section `optim`.
    """
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    begin = _decay_start(steps, optim)
    progress = min(1.0, max(0, step - begin) / max(1, steps - begin))
    shape = "cosine" if optim.schedule == "cosine" else optim.decay_shape
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * _DECAY_SHAPES[shape](progress)


def _decay_start(steps: int, optim: OptimConfig) -> int:
    """Step after which the rate decays."""
    return (optim.warmup if optim.schedule == "cosine"
            else max(optim.warmup, steps - round(optim.decay * steps)))


def schedule_warning(steps: int, optim: OptimConfig) -> str | None:
    """Warn where warm-up and schedule overlap, with the largest rate that is reached; else None."""
    reached = max(learning_rate(step, steps, optim) for step in {1, min(steps, max(1, optim.warmup))})
    decay = round(optim.decay * steps) if optim.schedule == "wsd" else 0
    if optim.warmup >= steps and reached < optim.lr:
        what = f"optim.warmup={optim.warmup} is longer than run.steps={steps}"
    elif optim.warmup > steps - decay:
        what = (f"the decay of optim.decay={optim.decay:g} begins inside optim.warmup={optim.warmup}, "
                f"and is shortened to {max(0, steps - optim.warmup)} steps")
    else:
        return None
    return f"{what}: the rate reaches {reached:.3g} of optim.lr={optim.lr:g}"


def resumed_rate(step: int, before: int, now: int, optim: OptimConfig) -> str | None:
    """Warn where another run.steps changes the rate of the steps that are left; else None.

    Args:
        step: the first step that is left.
        before: run.steps of the run so far.
        now: run.steps from here on.
        optim: section `optim`.
    """
    candidates = {step, *(_decay_start(steps, optim) + 1 for steps in (before, now)), before, before + 1, now}
    for changed in sorted(candidate for candidate in candidates if step <= candidate <= now):
        was, becomes = learning_rate(changed, before, optim), learning_rate(changed, now, optim)
        if not math.isclose(was, becomes, rel_tol=1e-9):
            return (f"run.steps was {before} and is {now}, and optim.schedule={optim.schedule} goes by it: "
                    f"the rate of step {changed} is {becomes:.3g}, where it was {was:.3g}")
    return None


# The share of the decay that is left, from 1 to 0 as the progress goes from 0 to 1.
_DECAY_SHAPES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # Hägele et al., 2024
}
