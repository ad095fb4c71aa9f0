"""Tables in the terminal."""

from collections.abc import Iterator


def table(rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table: columns of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = [column == 0 or not rows[-1][column][:1].isdigit() for column in range(len(widths))]
    for row in rows:
        yield "  ".join(cell.ljust(width) if left[column] else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths))).rstrip()
