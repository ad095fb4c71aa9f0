"""Memory of the device that a rank computes on: total, free, and peak.

No other file calls torch.cuda about memory. On the CPU it is the memory of the machine, or what a limit of
the job leaves of it (moetrain/machine.py). Ranks that share a memory have equal parts of it.
"""

import resource

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.size_check import Available
from moetrain.machine import job_memory, machine_memory, total_memory


def available_memory(mesh: Mesh, *, share_gpu: bool) -> Available:
    """Total memory that this rank may use: of the machine, and of its GPU where it has one."""
    host = total_memory() // mesh["node"].size
    if mesh.device.type != "cuda":
        return Available(host)
    gpu = torch.cuda.get_device_properties(mesh.device).total_memory
    return Available(host, gpu // _ranks_of_a_gpu(mesh, share_gpu))


def free_memory(mesh: Mesh, *, share_gpu: bool) -> int:
    """Bytes of the device that this rank may still allocate, including the reserve of torch's allocator."""
    if mesh.device.type != "cuda":
        return min([machine_memory(), *job_memory()]) // mesh["node"].size
    free, _ = torch.cuda.mem_get_info(mesh.device)
    in_reserve = torch.cuda.memory_reserved(mesh.device) - torch.cuda.memory_allocated(mesh.device)
    return free // _ranks_of_a_gpu(mesh, share_gpu) + in_reserve


def peak_memory(device: torch.device) -> int:
    """Most bytes that tensors of this process had on the GPU; on the CPU its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ranks_of_a_gpu(mesh: Mesh, share_gpu: bool) -> int:
    return -(-mesh["node"].size // torch.cuda.device_count()) if share_gpu else 1
