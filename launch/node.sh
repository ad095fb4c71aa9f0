#!/usr/bin/env bash
# Train on all GPUs of one node, or in NPROC processes on the CPU. torchrun starts the ranks.
#
#   bash launch/node.sh parallel=ep model=quickstart          one rank for each GPU
#   NPROC=2 bash launch/node.sh parallel=ep                   two ranks
#   RESTARTS=0 bash launch/node.sh ...                        no restart after a failure (default: 3 restarts)
#
# The arguments are overrides of `moetrain train`. The script ends with the exit code of the run. SIGTERM and
# SIGUSR1 are forwarded to the ranks, which save; the exit code is then 10.
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

export NODES=1 NODE_RANK=0
exec "$python" -m moetrain.launch "$@"
