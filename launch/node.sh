#!/usr/bin/env bash
# All GPUs of one node (or NPROC processes on the CPU), started by torchrun.
#
#   bash launch/node.sh parallel=ep model=quickstart          one rank per GPU
#   NPROC=2 bash launch/node.sh parallel=ep                   two ranks
#   RESTARTS=0 bash launch/node.sh ...                        no restart after a failure (3 without it)
#
# Ends with the exit code of the run. SIGTERM and SIGUSR1 reach the ranks: they save, and it ends with 10.
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

export NODES=1 NODE_RANK=0
exec "$python" -m moetrain.launch "$@"
