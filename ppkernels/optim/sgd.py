"""SGD with momentum for powered weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ppkernels.ops import sgd_step_
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


class PowerSGD(PowerOptimizer):
    """SGD with momentum that takes the powered step on weights that hold θ.

    For the weight of a layer with ``stores="theta"``::

        virtual: m ← μ·m + (1−τ)·g                    φ ← φ − lr·u·α|φ|^(α−1)
        chain:   m ← μ·m + (1−τ)·g·α|φ|^(α−1)         φ ← φ − lr·u

    with g = ∂L/∂θ, u = m (or, with Nesterov's momentum, the gradient + μ·m), and neither φ nor
    anything but m stored: one pass that reads and writes what the plain step does. The rules differ
    by the place of the momentum: under ``"virtual"`` it averages gradients of the network's weights
    and the factor is that of the moment; ``"chain"`` is what autograd and torch.optim.SGD do to a
    stored φ. Without momentum they are the same.

    All other parameters, biases, norms and the weights of plain layers with masks among them, take
    torch.optim.SGD's step. So do the weights of layers with ``stores="phi"``, whose gradient
    autograd has put through the chain rule already: for them both rules mean ``"chain"``.

    The weights are recognised at each step, whatever way they came here (``model``,
    ``model.parameters()``, parameter groups), with the exponent and the ``update_mask`` their layer
    has at that moment. Where the mask's bit is 0, weight and momentum keep their bits.

    Weight decay λ acts on all parameters of the group::

        coupled, of θ:   λ·θ joins ∂L/∂θ (ordinary L2)      decoupled, of θ:  θ ← (1 − lr·λ)·θ
        coupled, of φ:   λ·φ joins the gradient              decoupled, of φ:  θ ← (1 − lr·λ)^α·θ
                         that is averaged

    Coupled and of φ it acts as a penalty |θ|^(2/α) under ``"chain"``, as |θ|^((α+1)/α) under
    ``"virtual"``. On plain parameters θ and φ are the same.

    Args:
        params: a model; or its parameters or parameter groups, as any torch optimizer takes them. A
            group may have an option ``alpha`` (a float or a 0-dim float64 tensor): its tensors hold
            θ and take the powered step though they belong to no powered layer.
        lr: the learning rate, ≥ 0: a number, or a floating-point tensor of one, without a gradient,
            whose value is read at each step, by the kernel itself where it lies on the weights'
            GPU.
        momentum: μ ≥ 0.
        dampening: τ.
        weight_decay: λ ≥ 0. None by default.
        nesterov: Nesterov's momentum; needs μ > 0 and τ = 0.
        rule: ``"virtual"`` or ``"chain"``.
        decay: ``"coupled"`` or ``"decoupled"``.
        decay_of: ``"theta"`` or ``"phi"``.
        maximize: step against the gradient's sign.
        master_weights: keep a float32 copy of each weight of a half type, and float32 momentum, in
            the state; the copy is what is stepped. A weight that somebody overwrites counts for
            more than its copy.

    At α = 1 the steps are torch.optim.SGD's bit for bit (float32, compiled CPU kernels), with
    ``foreach`` or without; ``fused=True`` rounds the last elements of a tensor otherwise. A weight
    that is exactly 0 stays 0 for α > 1. ``.grad`` is ∂L/∂θ, so clipping works as ever. With a
    torch.amp.GradScaler the gradients are unscaled in the same pass, and stay scaled in ``.grad``.

    Raises:
        TypeError: an option that is no number.
        ValueError: an option out of range; layers that share a weight but not α, ``stores`` and
            update mask, at a step too.
        RuntimeError: at a step, sparse gradients, a weight that torch.nn.utils has replaced, or one
            whose powered layer is gone; no parameter has changed then. During the capture of a CUDA
            graph, a parameter without its state, and an ``lr`` or a count of Adam's steps in a
            tensor on the CPU, where replays would not look.

    Under torch.compile a step is a graph break and runs as it is.

    A step on a GPU waits for nothing, but for two things. The first step after a layer has changed
    compares exponents and masks of layers that share a weight; and the first with a dampening has
    to know from a GradScaler if it is left out.

    A CUDA graph can capture a step (torch's ``capturable``, which needs no switch here) once a step
    has made the state. Replays follow gradients, exponents (`pp.set_alpha`), an ``lr`` in a tensor
    on the GPU, and a GradScaler's scale and overflow flag. The rest is as it was at the capture:
    other options, an ``lr`` that is a number, update masks, which parameters have gradients;
    capture again when they change. Each capture keeps the masks and exponents it has found, and
    some kilobytes, as long as the memory of the weights lives: when a graph ends, nobody is told.

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", 2021.
    """

    def __init__(
        self,
        params: nn.Module | Parameters,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        rule: Rule = "virtual",
        decay: Decay = "coupled",
        decay_of: DecayOf = "theta",
        maximize: bool = False,
        master_weights: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
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
        self.check_number("momentum", options["momentum"], at_least=0)
        self.check_number("dampening", options["dampening"])
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                "PowerSGD: nesterov needs momentum > 0 and dampening = 0, got "
                f"{options['momentum']} and {options['dampening']}"
            )

    def step_batch(
        self, group: dict[str, Any], batch: Batch, grads: list[Tensor], scaling: Scaling
    ) -> None:
        """Take the fused step for the parameters of ``batch``."""
        masters = self.masters(group, batch.params)
        if group["momentum"] == 0:
            self._fused(group, batch, grads, [], masters, group["dampening"], scaling)
            return
        fresh: list[Tensor] = []
        try:
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in batch.params]
        except KeyError:
            fresh = [p for p in batch.params if "momentum_buffer" not in self.state[p]]
            self.check_state_may_begin(fresh[0])
            # Without dampening the first step is one like any other, and no GPU has to be asked.
            if group["dampening"] != 0 and scaling[1] is not None and scaling[1].item() != 0:
                return  # it is not the first step
            for parameter in fresh:
                self.state[parameter]["momentum_buffer"] = self.zero_state(parameter, group)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in batch.params]
        # The first gradient is taken whole, as torch.optim.SGD does.
        if not fresh or group["dampening"] == 0:
            self._fused(group, batch, grads, buffers, masters, group["dampening"], scaling)
            return
        is_fresh = {id(parameter) for parameter in fresh}
        for first, dampening in ((True, 0.0), (False, group["dampening"])):
            chosen = [i for i, p in enumerate(batch.params) if (id(p) in is_fresh) == first]
            if chosen:
                self._fused(
                    group,
                    batch.only(chosen),
                    [grads[i] for i in chosen],
                    [buffers[i] for i in chosen],
                    [masters[i] for i in chosen] if masters else [],
                    dampening,
                    scaling,
                )

    def _fused(
        self,
        group: dict[str, Any],
        batch: Batch,
        grads: list[Tensor],
        buffers: list[Tensor],
        masters: list[Tensor],
        dampening: float,
        scaling: Scaling,
    ) -> None:
        sgd_step_(
            batch.params,
            grads,
            buffers,
            masters=masters,
            momentum=group["momentum"],
            dampening=dampening,
            nesterov=group["nesterov"],
            **shared_options(batch, group, scaling),
        )
