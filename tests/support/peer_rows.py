"""Rows to move between ranks, in awkward numbers."""

# Rows for each destination, where they begin there, bytes of a row.
CASES = {
    "one": ([3], [0], 16),
    "several": ([5, 0, 9], [2, 7, 0], 48),
    "odd bytes": ([1, 4], [3, 0], 7),
    "words": ([40, 33, 1, 2], [1, 2, 3, 4], 12),
    "wide": ([2, 3], [0, 1], 5 * 16 * 32),
    "more rows than warps": ([300, 0, 150], [0, 0, 5], 16),
    "nothing": ([0, 0], [0, 4], 16),
    "no width": ([2, 1], [0, 0], 0),
}
