#!/usr/bin/env bash
# Environment and the whole test suite:   bash tools/test.sh [--quick | --all] [pytest arguments]
#
# Two files of tests run at once (TEST_WORKERS; 0: one after the other, in this process).
# --quick (about 3 minutes on two cores) leaves out the tests marked slow and most cases of those with several ranks; --all runs
# full products instead of pairs of factors, and what is marked full.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment dev,hf,deepspeed,megatron

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # ranks share the cores
exec python -m pytest tests -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
