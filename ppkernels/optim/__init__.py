"""Optimizers that take the powered step: they know the layers whose weight holds θ."""

from ppkernels.optim.adamw import PowerAdamW
from ppkernels.optim.sgd import PowerSGD

__all__ = ["PowerAdamW", "PowerSGD"]
