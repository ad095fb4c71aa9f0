"""moetrain: train sparse Mixture-of-Experts language models."""

from moetrain.packages import allow

__all__ = ["allow"]
__version__ = "0.1.0"
