"""Optimizers that take the powered step: they know the layers whose weight holds θ."""

from ppkernels.optim.rule import chain_gradient, sgd_step
from ppkernels.optim.sgd import PowerSGD

__all__ = ["PowerSGD", "chain_gradient", "sgd_step"]
