"""Start the ranks of a run, on this machine and on several. `train_on_ranks` is for Python programs.

    rank          what a process knows of itself as a rank
    status        how a run ended: status.json, logs of ranks
    local         ranks of this machine: run.nproc
    __main__      python -m moetrain.launch key=value ...: one launcher on each node; launch/node.sh, launch/nodes.sh, launch/slurm.sbatch
    node          which of how many nodes this is, from the environment
    rendezvous    the nodes find each other before anything is started, or say who is missing
    supervisor    starts torchrun, passes signals on to the ranks, and gives the exit code of the run
    agent         torchrun itself: its agent, without its tracebacks
    slurm_options the command line of `moetrain slurm`, and the ranks that follow from it
    slurm_node    what nodes of a partition have, and the share of it that a job takes

Sockets here have no authentication, as those of torch.distributed: on a trusted network only. No torch but in agent.
"""

from moetrain.launch.local import train_on_ranks as train_on_ranks
