"""Changes of a checkpoint's weights outside training: read tensors one by one, write a run that holds them.

    with open_weights("runs/small") as source:
        write_run("runs/large", config_of_large, tensors_of_large(source), source=source)

    resize_experts("runs/small", "runs/larger", keep=[0, 2, 5], add=3)
"""

from moetrain.transform.reader import WeightsReader, open_weights
from moetrain.transform.resize import most_used, resize_experts
from moetrain.transform.writer import Training, write_run

__all__ = ["Training", "WeightsReader", "most_used", "open_weights", "resize_experts", "write_run"]
