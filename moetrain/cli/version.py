"""moetrain version: print the versions that a bug report needs, from package metadata without imports."""

import platform
from importlib.metadata import PackageNotFoundError, version

import moetrain


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    print(f"moetrain {moetrain.__version__}")
    print(f"python {platform.python_version()}")
    for package in ("torch", "hydra-core"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    return 0
