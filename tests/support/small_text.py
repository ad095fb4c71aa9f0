"""Text for runs of a few steps: two domains of short documents, all different (equal ones are read once)."""

from pathlib import Path

WORDS = {"letters": ("abc", "de", "f", "ghij"), "numbers": ("12", "345", "6", "7890")}


def write(folder: Path, documents: int = 30) -> Path:
    """Write a folder with so many files for each domain."""
    for domain, words in WORDS.items():
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            said = (f"{words[(number * place + place) % 4]} {place + number}."
                    for place in range(5 + 7 * (number % 5)))
            (folder / domain / f"{number}.txt").write_text(" ".join(said))
    return folder
