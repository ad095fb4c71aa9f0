#!/usr/bin/env bash
# From a bare clone to a trained sparse MoE language model:   bash launch/quickstart.sh [overrides]
#
# Makes .venv, prepares the built-in corpus, trains 0.95 M parameters (two CPU ranks that share the experts, or one GPU),
# evaluates beside n-gram models, draws the expert load, writes some text. Run it again: it goes on, or says it is done.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

run=runs/quickstart
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    ranks=()
else
    ranks=(parallel=ep run.nproc=2)        # two ranks of one thread are the fastest way to use two cores
fi

moetrain train experiment=quickstart "${ranks[@]}" "$@"
echo
moetrain eval run.name=quickstart eval.ngram=4
echo
moetrain generate run.name=quickstart generate.prompt="def main(" generate.tokens=160
cat <<END

The run is in $run: metrics.jsonl, eval.jsonl, loads.npz, checkpoints/, report/expert_load.png
Next:
  moetrain generate run.name=quickstart generate.prompt="import "           more text
  moetrain train experiment=quickstart run.name=micro balance=micro          the same run, balanced inside micro-batches
  moetrain train run.name=mine data.path=/path/to/text run.steps=500         your own text
  moetrain --help                                                           everything else
(the command is .venv/bin/moetrain; source .venv/bin/activate puts it on your PATH)
END
