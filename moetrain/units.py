"""Numbers as short text: counts, sizes and durations."""


def decimal(value: float, unit: str = "", digits: int = 3) -> str:
    """Write a number as 41.2 MB or 412 k, with significant digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            break
        value /= 1000
    else:
        prefix = "T"
    return f"{value:.{digits}g} {prefix}{unit}".rstrip()


def scientific(value: float) -> str:
    """Write a number as 2.9e-4."""
    mantissa, exponent = f"{value:.1e}".split("e") if value == value else ("nan", "0")
    return f"{mantissa}e{int(exponent)}"


def count(value: float) -> str:
    """Write a count as 412k."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.{0 if value >= 100 * scale else 1}f}{unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Write bytes as 33.1G, in binary units."""
    for unit, scale in (("T", 2**40), ("G", 2**30), ("M", 2**20)):
        if value >= scale:
            return f"{value / scale:.{0 if value >= 100 * scale else 1}f}{unit}"
    return f"{value / 2**10:.0f}K"


def duration(seconds: float) -> str:
    """Write seconds as 1.27s, 45s, 12m05, 3h06 or 2d04h."""
    if seconds < 9.995:
        return f"{seconds:.2f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
