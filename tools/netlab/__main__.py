"""Run a command on every rank of an emulated network: python -m tools.netlab [options] -- command."""

import sys

from tools.netlab.lab import main
from tools.netlab.processes import LabError

try:
    sys.exit(main(sys.argv[1:]))
except LabError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
