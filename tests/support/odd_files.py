"""What may lie where a file is expected, by name: what a reader says that it is."""

import os
import socket
from pathlib import Path

ODD = {"fifo": "a named pipe", "folder": "a folder", "socket": "a socket", "circle": "a circle of links",
       "nowhere": "a link that leads nowhere", "device": "a device", "linked fifo": "a named pipe"}


def make_odd(path: Path, kind: str) -> str:
    """Put it at `path`, in place of what lies there, and return what it is."""
    path.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            folder = os.open(path.parent, os.O_RDONLY)           # the name of a socket is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
        case "circle":
            path.symlink_to(path)
        case "nowhere":
            path.symlink_to(path.with_name("missing"))
        case "device":
            path.symlink_to("/dev/zero")
        case "linked fifo":
            os.mkfifo(path.with_name(f"{path.name}.pipe"))
            path.symlink_to(path.with_name(f"{path.name}.pipe"))
    return ODD[kind]
