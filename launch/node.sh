#!/usr/bin/env bash
# All GPUs of one node (or NPROC processes on the CPU), started by torchrun.
#
#   bash launch/node.sh parallel=ep model=quickstart          one rank per GPU
#   NPROC=2 bash launch/node.sh parallel=ep
#
# torchrun turns every failure into exit code 1; <run.dir>/status.json has the real one.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=""
[ -x .venv/bin/torchrun ] && bin=.venv/bin/

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
RESTARTS="${RESTARTS:-3}"                         # restarts of all ranks after a failure; each resumes from the newest save

# Without it restarted ranks read the addresses of dead ones from the store and never connect.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Threads per rank; torchrun would set 1.
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / NPROC > 0 ? cores / NPROC : 1))}"

# Mistakes in the config once, before any rank starts.
RANK=0 WORLD_SIZE="$NPROC" "${bin}python3" -m moetrain train "$@" --cfg job > /dev/null

exec "${bin}torchrun" --standalone --nproc-per-node "$NPROC" --max-restarts "$RESTARTS" -m moetrain train "$@"
