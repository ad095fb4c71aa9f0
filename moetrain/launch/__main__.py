"""Command-line launcher of one node: `python -m moetrain.launch [key=value ...]`.

launch/nodes.sh runs it on every node. Environment variables place the node among the others (node.py); the
arguments are the overrides of `moetrain train`. On every node it ends with the exit code of the run
(moetrain/__main__.py lists them).
"""

import os
import sys
import traceback
from collections.abc import Sequence

from moetrain import streams
from moetrain.config.compose import run_dir
from moetrain.config.size_check import refuse_too_large
from moetrain.errors import MoETrainError
from moetrain.launch.node import config_for, from_environment
from moetrain.launch.rendezvous import wait_for_nodes
from moetrain.launch.supervisor import supervise
from moetrain.runs.completion import finished_step


def main(overrides: Sequence[str]) -> int:
    """Check the config, wait for the other nodes, train on the ranks of this one. Returns the exit code."""
    streams.keep_open()
    streams.outlive()
    try:
        node = from_environment(os.environ)
        # Report a mistake once, before any rank starts: in the config, or a command that contradicts its run.
        config = config_for(overrides, node.ranks)
        done = finished_step(config, run_dir(config))
        refuse_too_large(config, node.ranks, node.nproc)
        wait_for_nodes(node)
        return supervise(node, ["train", *overrides], run_dir(config), config.run.grace_s,
                         was_finished=done is not None)
    except MoETrainError as error:
        if os.environ.get("MOETRAIN_DEBUG") == "1":
            traceback.print_exc()
        else:
            print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
