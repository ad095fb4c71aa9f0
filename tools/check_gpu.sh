#!/usr/bin/env bash
# For whoever has a GPU: build the kernels, check them, measure them. One call of at most ten minutes; call again to go on.
#
#     bash tools/check_gpu.sh [folder]          results go to build/gpu unless a folder is named
#
# Stages that are done are not repeated. Hand back the folder: *.log, parity_*/parity.json, train.json, train_alone.json, ops.json, balance_cost.md.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out="${1:-build/gpu}"
mkdir -p "$out"
python="${PYTHON:-python}"
end=$((SECONDS + 560))
export MOETRAIN_KERNELS=1

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv > "$out/gpu.csv" || exit 1
arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a >= 9 else ""))') || exit 1

stage() {                                        # name, seconds at most, command
    local name=$1 limit=$2 left=$((end - SECONDS)); shift 2
    [ -e "$out/$name.done" ] && { echo "$name: done before"; return 0; }
    [ "$left" -lt 20 ] && { echo "$name: no time left, call again"; return 1; }
    echo "$name ..."
    timeout $((left < limit ? left : limit)) "$@" > "$out/$name.log" 2>&1
    local status=$?
    tail -n 3 "$out/$name.log"
    [ "$status" -eq 0 ] && touch "$out/$name.done" || echo "$name: exit $status, see $out/$name.log"
    return "$status"
}

rm -f "$out/build.done"                          # what is built is known by its sources: nothing is built twice
stage build 240 "$python" tools/build_cuda.py --archs "$arch" || exit 1
stage tests 240 "$python" -m pytest -m gpu tests/ops -rs
# Virtual ranks wait for each other on one GPU: kernels are loaded beforehand, and streams do not share a queue.
stage peers 90 env CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32 "$python" -m pytest -m gpu tests/comm/test_peer.py -rs
# The same training without kernels and with them, alone and on four processes that share the GPU through symmetric memory.
stage parity_alone 200 "$python" tools/check_parity.py --device cuda --out "$out/parity_alone" --only alone
stage parity_ranks 400 "$python" tools/check_parity.py --device cuda --out "$out/parity_ranks" --only ranks
# Qwen3-30B-A3B cut in depth: beside transformers (two models, 16 bytes a parameter), then ours alone with four times the tokens.
large=$("$python" -c 'import torch; print(int(torch.cuda.get_device_properties(0).total_memory > 100 << 30))')
qwen3=(--device cuda --dtype bfloat16 --model qwen3_30b_a3b --vocab 151936 --seq 4096 --head-chunk 2048 --zipf 1 --rounds 4)
stage train 150 "$python" tools/bench_train.py "${qwen3[@]}" --layers $((large ? 4 : 1)) --batch 2 --peers grouped_mm --out "$out/train.json"
stage train_alone 120 "$python" tools/bench_train.py "${qwen3[@]}" --layers $((large ? 6 : 3)) --batch 8 --peers --out "$out/train_alone.json"
# What the statistics of routers and the balance loss cost of a step at that shape: at most 1 % is the target.
stage balance 120 "$python" tools/bench_balance.py --device cuda --pairs 15 --out "$out/balance_cost.md"
if command -v compute-sanitizer > /dev/null; then
    # Small shapes: the sanitizer is slow. racecheck is about shared memory, memcheck about everything else.
    few="(test_route_plan and 1000) or (test_rows and 333) or (test_swiglu and 65) or (test_router and mixtral and 1000) or (weight and 136)"
    stage sanitizer 150 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -m gpu tests/ops -k "$few"
    stage racecheck 150 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" -m pytest -m gpu tests/ops -k "$few"
fi
left=$((end - SECONDS))
[ "$left" -gt 30 ] && timeout "$left" "$python" tools/bench_ops.py --out "$out/ops.json" --tokens 16384,8192,32768 \
    --minutes "$((left / 60))"
echo "results in $out"
