#!/usr/bin/env bash
# From a bare clone to a trained sparse MoE language model:   bash launch/quickstart.sh [overrides of moetrain train]
#
# Makes .venv, prepares the built-in corpus, trains 0.95 M parameters (two CPU ranks that share the experts, or one GPU),
# evaluates beside n-gram models, draws the expert load, writes some text. Run it again: it goes on, or says it is done.
# All of it is about the run that the overrides name: run.name=mine, experiment=debug, model.num_experts=16, ...
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment ""           # no extras

ranks=(parallel=ep run.nproc=2)            # two ranks of one thread are the fastest way to use two cores
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && ranks=()
for word in "$@"; do
    case "$word" in
    -*) echo "launch/quickstart.sh takes overrides, key=value, and was given $word; moetrain train --help lists them" >&2
        exit 2 ;;
    parallel=*) ranks=() ;;                # another mode brings its own number of ranks
    esac
done
run=(experiment=quickstart "$@")           # every command finds the run by the overrides that trained it

# Runs a command that does not outlive this script: a signal that comes here alone is passed on, and training saves. In the
# background, because bash acts on signals while it waits by `wait`, not while a command runs.
step() {
    local before=-1 code=0
    [ -z "$told" ] || exit $((128 + $(kill -l "$told")))
    (trap - INT; exec "$@") &               # the shell would have it ignore Ctrl-C
    started=$!
    while [ "$before" != "$signals" ]; do   # a signal ends `wait`, not the command
        before=$signals code=0
        wait "$started" || code=$?
    done
    started=""
    return "$code"
}
pass_on() {
    told=$1 signals=$((signals + 1))
    [ -z "$started" ] || [ "$1" = INT ] || kill -s "$1" "$started" 2>/dev/null || true      # a terminal sends INT to all of it
}
told="" signals=0 started=""
for name in TERM HUP USR1 INT; do
    # shellcheck disable=SC2064  # the name as it is now
    trap "pass_on $name" "$name"
done

step moetrain train "${run[@]:0:1}" "${ranks[@]}" "${run[@]:1}"
echo
step moetrain eval "${run[@]:0:1}" eval.ngram=4 "${run[@]:1}"
echo
# 2: the run was trained on tokens that stand for no text, and generate has said so.
step moetrain generate "${run[@]:0:1}" generate.prompt="def main(" generate.tokens=160 "${run[@]:1}" || [ $? -eq 2 ]

cat <<END

The folder of the run, named above, has metrics.jsonl, eval.jsonl, loads.npz, checkpoints/ and report/expert_load.png
Next:
  moetrain generate$(printf ' %q' "${run[@]}") generate.prompt="import "
  moetrain train experiment=quickstart run.name=micro balance=micro          the same run, balanced inside micro-batches
  moetrain train run.name=mine data.path=/path/to/text run.steps=500         your own text
  moetrain --help                                                           everything else
(the command is .venv/bin/moetrain; source .venv/bin/activate puts it on your PATH)
END
