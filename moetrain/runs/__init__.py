"""Files of a run's directory, as far as they are nobody else's: no torch, no loop."""
