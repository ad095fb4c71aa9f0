#!/usr/bin/env bash
# One process on one GPU or the CPU, a tiny network, generated data: a run of seconds to step through.
#
#   bash launch/debug.sh                          the run
#   bash launch/debug.sh run.steps=5 loss=[z]     with overrides
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

export MOETRAIN_DEBUG=1                           # tracebacks
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"   # one GPU, where there is one

exec "$python" -m moetrain train experiment=debug "$@"
