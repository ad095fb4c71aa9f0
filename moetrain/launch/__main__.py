"""python -m moetrain.launch [key=value ...]: train on the ranks of this node, one of NODES.

The script that runs it on every node is launch/nodes.sh; node.py has the settings. The overrides are those of
`moetrain train`. Exit codes: those of the run (moetrain/__main__.py), on every node.
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
from moetrain.runs.completion import finished


def main(overrides: Sequence[str]) -> int:
    streams.keep_open()
    streams.outlive()
    try:
        node = from_environment(os.environ)
        config = config_for(overrides, node.ranks)      # mistakes once, before any rank starts
        done = finished(config, run_dir(config))        # and a command that contradicts its run
        refuse_too_large(config, node.ranks, node.nproc)
        wait_for_nodes(node)
        return supervise(node, ["train", *overrides], run_dir(config), config.run.grace_s, was_finished=done is not None)
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
