"""Phrases that several rules use in their advice."""


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0] if n > 0 else [1]


def choose(key: str, values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:16])
    return f"{key}={values[0]}" if len(values) == 1 else f"choose {key} from {shown}"


def counted_ranks(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks} ranks"
