#!/usr/bin/env bash
# The first hour on a GPU:   bash tools/check/gpu.sh [--list] [--only stage ...] [--out folder] [--help]
#
# At most ten minutes a call; call it again to go on. What it does: tools/check/gpu.py; what to expect: docs/howto/first_gpu.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-}"                       # .venv, where launch/quickstart.sh made one; else the Python that has torch
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
exec "$python" -m tools.check.gpu "$@"
