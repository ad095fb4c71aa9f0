"""Ranks of several machines: one launcher on each, torchrun below it, one ending.

    __main__      python -m moetrain.nodes key=value ...    what launch/node.sh, launch/nodes.sh and launch/slurm.sbatch run
    node          which of how many nodes this is, from the environment
    rollcall      the nodes find each other before anything is started, or say who is missing
    supervise     starts torchrun, passes signals on to the ranks, and gives the exit code of the run
    slurm_options the command line of `moetrain slurm`, and the ranks that follow from it
    slurm_node    what nodes of a partition have, and the share of it that a job takes
    agent         torchrun itself: its agent, without its tracebacks

Sockets here have no authentication, as those of torch.distributed: on a trusted network only. No torch but in agent.
"""
