"""What DeepSpeed compiles at its first use (half a minute) is kept in the environment, for all tests and the next session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
