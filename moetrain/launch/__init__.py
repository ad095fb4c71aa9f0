"""Start the ranks of a run, on one machine or on several. Python programs call `train_on_ranks`.

    rank            a process as a rank: whether a launcher started it, its number, its error output
    program         what this process runs, so that further ranks run the same
    foreign_ranks   processes that srun or mpirun started without saying which rank each is
    signals         signals forwarded to the ranks
    status          status.json, which says how a run ended, and the log files of ranks
    local           the ranks of this machine (run.nproc)
    __main__        one launcher on each node: launch/node.sh, launch/nodes.sh and launch/slurm.sbatch run it
    node            which of how many nodes this is, from environment variables
    rendezvous      the nodes find each other before any rank starts, or name the one that is missing
    supervisor      runs torchrun on one node, forwards signals to its ranks, decides the run's exit code
    agent           torchrun's own agent, without its tracebacks
    ranks_of_agent  process ids of the ranks that an agent started
    slurm_options   the command line of `moetrain slurm`, and the number of ranks that follows from it
    slurm_node      the hardware of a partition's nodes, and the share of it that a job requests

The sockets have no authentication, like those of torch.distributed: use them on a trusted network only. No
file but agent imports torch.
"""

from moetrain.launch.local import train_on_ranks as train_on_ranks
