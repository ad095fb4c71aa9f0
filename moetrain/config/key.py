"""Declaration of one key of the schema (config/schema.py)."""

from dataclasses import field
from typing import Any


def key(default: Any, help: str, *, path: bool = False) -> Any:
    """Declare a field.

    Args:
        default: its default; a list or dict is copied for every instance.
        help: the line that `--help` and the reference page show.
        path: whether the text is the path of a file or folder: never empty, and `~` is the home directory.
    """
    about = {"help": help, "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)
