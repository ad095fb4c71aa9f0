"""Whether a run fits into the memory of this rank, by formula, before anything is allocated."""

from moetrain.comm.mesh import Mesh
from moetrain.config.schema import Config
from moetrain.config.size_check import too_full, too_large
from moetrain.train.memory.device_memory import available_memory, free_memory


def refuse_what_cannot_fit(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError if this rank cannot hold the run, or not beside what other programs hold of its GPU."""
    available = available_memory(mesh, share_gpu=config.run.share_gpu)
    error = too_large(config, mesh.size, available)
    if error is None and available.gpu:
        error = too_full(config, mesh.size, available.gpu, free_memory(mesh, share_gpu=config.run.share_gpu))
    if error:
        raise error
