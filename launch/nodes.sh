#!/usr/bin/env bash
# One run on several nodes. On every one of them, with the same overrides:
#
#   NODES=2 NODE_RANK=0 HEAD=node-a bash launch/nodes.sh parallel=ep run.name=big      on node-a
#   NODES=2 NODE_RANK=1 HEAD=node-a bash launch/nodes.sh parallel=ep run.name=big      on the other
#
#   NODES         nodes                                   NPROC          ranks on each node (its GPUs)
#   NODE_RANK     this one, from 0                        RESTARTS       of all ranks after a failure (3)
#   HEAD          name or address of node 0               RDZV_TIMEOUT   seconds that nodes wait for each other (60)
#   PORT          of node 0 (29400)
#
# The nodes share the run's directory. Nothing is encrypted or authenticated: on a trusted network only.
# Ends with the exit code of the run on every node, and with 15 when the nodes do not find each other.
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

exec "$python" -m moetrain.launch "$@"
