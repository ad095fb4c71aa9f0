"""Changes of a checkpoint's weights outside training: read tensors one by one, write a run that holds them.

    with open_weights("runs/small") as source:
        write_run("runs/large", config_of_large, tensors_of_large(source), source=source)

    transform("runs/large", Rule("copy", {}, "exact"), [source], config, iter(source), verify=True)

    resize_experts("runs/small", "runs/larger", keep=[0, 2, 5], add=3)
"""

from moetrain.transform.frame import Rule, Transformed, transform
from moetrain.transform.reader import WeightsReader, open_weights
from moetrain.transform.resize import most_used, resize_experts
from moetrain.transform.writer import Training, write_run

__all__ = ["Rule", "Training", "Transformed", "WeightsReader", "most_used", "open_weights", "resize_experts",
           "transform", "write_run"]
