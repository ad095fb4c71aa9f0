"""A config whose dtype is settled: on all ranks the same, and that of the run which goes on."""

from dataclasses import replace
from pathlib import Path

from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import largest_over
from moetrain.config.schema import Config
from moetrain.model.build import computes_bfloat16
from moetrain.plan.precision import choose_dtype
from moetrain.runs.completion import newest_sound_checkpoint, trained_config


def with_dtype(config: Config, directory: Path, mesh: Mesh) -> Config:
    """run.dtype=auto becomes what the run computes in, and so it is recorded. Collective where it is auto."""
    if config.run.dtype != "auto":
        return config
    without = largest_over(mesh["batch"], float(not computes_bfloat16(mesh.device)))
    dtype = choose_dtype("auto", mesh.device.type, computes_bfloat16=not without, recorded=_recorded(directory))
    return replace(config, run=replace(config.run, dtype=dtype))


def _recorded(directory: Path) -> str | None:
    """The dtype that the newest checkpoint was trained with; None for a run that begins."""
    checkpoint = newest_sound_checkpoint(directory)
    return None if checkpoint is None else trained_config(directory, checkpoint).run.dtype
