"""A file in memory, with an encoding."""

import io


class File(io.StringIO):
    encoding = "utf-8"
