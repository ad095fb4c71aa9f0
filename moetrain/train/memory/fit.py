"""Check by formula, before anything is allocated, that a run fits into the memory of this rank."""

from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config
from moetrain.config.size_check import too_full, too_large
from moetrain.train.memory.device_memory import available_memory, free_memory


def refuse_what_cannot_fit(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if this rank's memory, or what is free on its GPU, cannot hold the run.

    The formula is a lower bound (config/size_check.py), so a run that might fit is not refused.

    Args:
        config: the config of the run.
        mesh: all ranks, for their number and for this rank's device.
    """
    available = available_memory(mesh, share_gpu=config.run.share_gpu)
    error = too_large(config, mesh.size, available)
    if error is None and available.gpu:
        error = too_full(config, mesh.size, available.gpu, free_memory(mesh, share_gpu=config.run.share_gpu))
    if error:
        raise error
