"""Files of a run's directory, shared by training, launchers and reports. Imports no torch."""
