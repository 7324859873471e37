"""AdamW, and Adam, for powered weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppkernels.ops import adam_step_
from ppkernels.optim.batch import Batch
from ppkernels.optim.power_optimizer import (
    Decay,
    DecayOf,
    Parameters,
    PowerOptimizer,
    Rule,
    Scaling,
    shared_options,
)


class PowerAdamW(PowerOptimizer):
    """AdamW that takes the powered step on weights that hold θ.

    For the weight of a layer with ``stores="theta"``, with g = ∂L/∂θ::

        virtual: m, v average g and g²                φ ← φ − lr·u·α|φ|^(α−1)
        chain:   m, v average those of g·α|φ|^(α−1)   φ ← φ − lr·u

        u = (m/(1−β₁^t)) / (√(v/(1−β₂^t)) + ε)

    and φ is never stored. Under ``"chain"``, which is what torch.optim.AdamW does to a stored φ,
    the division by √v takes the factor α|φ|^(α−1) out again: all φ move alike, and little is left
    of Powerpropagation. ``"virtual"`` keeps it.

    All other parameters, the weights of layers with ``stores="phi"``, exponents, update masks,
    weight decay, half types, GradScaler, CUDA graphs and errors: as in `PowerSGD`.

    Args:
        params: as in `PowerSGD`.
        lr: as in `PowerSGD`.
        betas: β₁ and β₂, in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0. None by default, where torch.optim.AdamW has 0.01.
        amsgrad: the largest v so far takes the place of v.
        rule, decay_of, maximize, master_weights: as in `PowerSGD`.
        decay: ``"decoupled"``, or ``"coupled"``: Adam with L2.

    At α = 1 the steps are torch.optim.AdamW's to rounding.

    The state_dict of a torch.optim.AdamW or Adam may be loaded.

    Source: Schwarz et al. 2021, appendix (the virtual rule); Loshchilov & Hutter 2019; Kingma & Ba
    2015; Reddi et al. 2018 (AMSGrad).
    """

    def __init__(
        self,
        params: nn.Module | Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        rule: Rule = "virtual",
        decay: Decay = "decoupled",
        decay_of: DecayOf = "theta",
        maximize: bool = False,
        master_weights: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "rule": rule,
            "decay": decay,
            "decay_of": decay_of,
            "maximize": maximize,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise unless ``options`` are those of a group."""
        super().check_options(options)
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"PowerAdamW: betas must be two numbers, got {betas!r}")
        for beta in betas:
            self.check_number("betas", beta, at_least=0, below=1)
        self.check_number("eps", options["eps"], at_least=0)

    def translated(self, group: dict[str, Any]) -> dict[str, Any]:
        """torch's Adam and AdamW say by a flag which decay they mean."""
        if "decay" in group or "decoupled_weight_decay" not in group:
            return group
        decay = "decoupled" if group["decoupled_weight_decay"] else "coupled"
        return {**group, "decay": decay}

    def step_batch(
        self, group: dict[str, Any], batch: Batch, grads: list[Tensor], scaling: Scaling
    ) -> None:
        """Take the fused step for the parameters of ``batch``."""
        masters = self.masters(group, batch.params)
        states = [self._state(parameter, group) for parameter in batch.params]
        beta1, beta2 = group["betas"]
        adam_step_(
            batch.params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            steps=[state["step"] for state in states],
            masters=masters,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            **shared_options(batch, group, scaling),
        )

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            self.check_state_may_begin(parameter)
            # Counted where the weight lies, so that a step on a GPU waits for nothing.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = self.zero_state(parameter, group)
            state["exp_avg_sq"] = self.zero_state(parameter, group)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = self.zero_state(parameter, group)
        return state
