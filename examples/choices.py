"""Print which experts the domains of the held-out data used."""

from pathlib import Path

from moetrain.report.specialization import read_specialization


def print_choices(run_dir: Path) -> dict[str, list[int]]:
    """Print and return the held-out choices of each domain, by expert, summed over the layers."""
    found = read_specialization(run_dir / "specialisation.npz")
    chosen = sum(found.choices.values())
    for domain, counts in zip(found.domains, chosen.tolist()):
        print(f"{domain:12} " + "  ".join(f"expert {expert}: {count}" for expert, count in enumerate(counts)))
    return dict(zip(found.domains, chosen.tolist()))
