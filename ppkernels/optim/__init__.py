"""Optimizers that take the powered step: they know the layers whose weight holds θ."""

from ppkernels.optim.sgd import PowerSGD, chain_gradient, sgd_step

__all__ = ["PowerSGD", "chain_gradient", "sgd_step"]
