#!/usr/bin/env bash
# Train a tiny network on generated data in one process, on one GPU or the CPU: a run of seconds to debug.
#
#   bash launch/debug.sh                          the run
#   bash launch/debug.sh run.steps=5 loss=[z]     with overrides of `moetrain train`
#
# CUDA_VISIBLE_DEVICES chooses the GPU (0). Errors print their traceback.
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

export MOETRAIN_DEBUG=1                                   # print tracebacks
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"   # one GPU, where there is any

exec "$python" -m moetrain train experiment=debug "$@"
