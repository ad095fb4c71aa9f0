#!/usr/bin/env bash
# From a fresh clone to a trained sparse MoE language model:
#
#   bash launch/quickstart.sh                                       the run `quickstart`
#   bash launch/quickstart.sh run.name=mine model.num_experts=16    with overrides of `moetrain train`
#
# The script makes .venv, prepares the built-in corpus, trains 0.95 M parameters (on two CPU ranks that share
# the experts, or on one GPU), evaluates beside n-gram models, draws the expert load and generates some text.
# Started again, it resumes the run or says that it is finished.
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment ""           # no extras

ranks=(parallel=ep run.nproc=2)            # two ranks with one thread each use two cores best
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && ranks=()
for word in "$@"; do
    case "$word" in
    -*) echo "launch/quickstart.sh takes overrides, key=value, and was given $word;" \
            "moetrain train --help lists them" >&2
        exit 2 ;;
    parallel=*) ranks=() ;;                # the user chooses the parallelism, and so the number of ranks
    esac
done
run=(experiment=quickstart "$@")           # every command finds the run by the overrides that trained it

# Run a command that does not outlive this script: signals are forwarded to it, and training saves. It runs in
# the background, because bash handles signals during `wait`, but not while a foreground command runs.
step() {
    local before=-1 code=0
    [ -z "$told" ] || exit $((128 + $(kill -l "$told")))
    (trap - INT; exec "$@") &               # bash makes background commands ignore Ctrl-C
    started=$!
    while [ "$before" != "$signals" ]; do   # a signal ends `wait`, not the command
        before=$signals code=0
        wait "$started" || code=$?
    done
    started=""
    return "$code"
}
forward() {
    told=$1 signals=$((signals + 1))
    # A terminal sends INT to all processes itself.
    [ -z "$started" ] || [ "$1" = INT ] || kill -s "$1" "$started" 2>/dev/null || true
}
told="" signals=0 started=""
for name in TERM HUP USR1 INT; do
    # shellcheck disable=SC2064  # expand the name now, not when the signal comes
    trap "forward $name" "$name"
done

step moetrain train "${run[@]:0:1}" "${ranks[@]}" "${run[@]:1}"
echo
step moetrain eval "${run[@]:0:1}" eval.ngram=4 "${run[@]:1}"
echo
# Exit code 2 means that the run was trained on tokens without a text, which `generate` has said.
step moetrain generate "${run[@]:0:1}" generate.prompt="def main(" generate.tokens=160 "${run[@]:1}" ||
    [ $? -eq 2 ]

cat <<END

The folder of the run, named above, has metrics.jsonl, eval.jsonl, loads.npz, checkpoints/
and report/expert_load.png
Next:
  moetrain generate$(printf ' %q' "${run[@]}") generate.prompt="import "
  moetrain train experiment=quickstart run.name=micro balance=micro     balanced inside micro-batches
  moetrain train run.name=mine data.path=/path/to/text run.steps=500    your own text
  moetrain --help                                                       everything else
(the command is .venv/bin/moetrain; source .venv/bin/activate puts it on your PATH)
END
