"""Keep what DeepSpeed compiles at its first use (half a minute) in the environment, for all test runs."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
