"""Changes of a checkpoint's weights outside training: read tensors one by one, write a run that holds them.

    with open_weights("runs/small") as source:
        write_run("runs/large", config_of_large, tensors_of_large(source), source=source)
"""

from moetrain.transform.reader import WeightsReader, open_weights
from moetrain.transform.writer import write_run

__all__ = ["WeightsReader", "open_weights", "write_run"]
