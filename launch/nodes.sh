#!/usr/bin/env bash
# Train one run on several nodes. Start the script on each node, with the same overrides of `moetrain train`:
#
#   NODES=2 NODE_RANK=0 HEAD=node-a bash launch/nodes.sh parallel=ep run.name=big      on node-a
#   NODES=2 NODE_RANK=1 HEAD=node-a bash launch/nodes.sh parallel=ep run.name=big      on the other node
#
#   NODES          number of nodes
#   NODE_RANK      number of this node, from 0
#   HEAD           name or address of node 0
#   PORT           port of node 0 (29400)
#   NPROC          ranks on each node (the number of its GPUs)
#   RESTARTS       how often all ranks are started again after a failure (3)
#   RDZV_TIMEOUT   seconds that the nodes wait for each other (60)
#
# The nodes need a file system that they share for the run's directory. Nothing is encrypted or authenticated:
# use it on a trusted network only. On every node the script ends with the exit code of the run, or with 15
# when the nodes do not find each other.
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

exec "$python" -m moetrain.launch "$@"
