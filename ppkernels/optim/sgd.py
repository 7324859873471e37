"""SGD with momentum for powered weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ppkernels import _powered
from ppkernels._checks import alpha_tensor, check_alpha
from ppkernels.optim.rule import Rule, check_rule, moved, phi_gradient

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class PowerSGD(Optimizer):
    """SGD with momentum that takes the powered step on weights that hold θ.

    For the weight of a layer with ``stores="theta"``::

        virtual: m ← μ·m + (1−τ)·g                    φ ← φ − lr·u·α|φ|^(α−1)
        chain:   m ← μ·m + (1−τ)·g·α|φ|^(α−1)         φ ← φ − lr·u

    with g = ∂L/∂θ, u = m (or, with Nesterov's momentum, the gradient + μ·m), and neither φ nor
    anything but m stored. The rules differ by the place of the momentum: under ``"virtual"`` it
    averages gradients of the network's weights and the factor is that of the moment; ``"chain"`` is
    what autograd and torch.optim.SGD do to a stored φ. Without momentum they are the same.

    All other parameters, biases and norms among them, take torch.optim.SGD's step. So do the
    weights of layers with ``stores="phi"``, whose gradient autograd has put through the chain rule
    already: for them both rules mean ``"chain"``.

    The weights are recognised at each step, whatever way they came here (``model``,
    ``model.parameters()``, parameter groups), with the exponent their layer has at that moment.

    Args:
        params: a model; or its parameters or parameter groups, as any torch optimizer takes them. A
            group may have an option ``alpha`` (a float or a 0-dim float64 tensor): its tensors hold
            θ and take the powered step though they belong to no powered layer.
        lr: the learning rate, ≥ 0.
        momentum: μ ≥ 0.
        dampening: τ.
        nesterov: Nesterov's momentum; needs μ > 0 and τ = 0.
        rule: ``"virtual"`` or ``"chain"``.
        maximize: step against the gradient's sign.

    At α = 1 the steps are torch.optim.SGD's bit for bit. A weight that is exactly 0 stays 0 for
    α > 1.

    Raises:
        TypeError: an option that is no number; ``weight_decay`` in a group, which is not supported.
        ValueError: an option out of range; layers that share a weight but not α and ``stores``,
            at a step too.
        RuntimeError: at a step, sparse gradients, or a weight that torch.nn.utils has replaced.

    Under torch.compile a step is a graph break and runs as it is.

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", 2021.
    """

    steps_theta = True

    # The registry's generation when the layers that share a weight were last found to agree.
    _agreed: object = None

    def __init__(
        self,
        params: nn.Module | Parameters,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        nesterov: bool = False,
        *,
        rule: Rule = "virtual",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "rule": rule,
            "maximize": maximize,
            "alpha": None,
        }
        super().__init__(params.parameters() if isinstance(params, nn.Module) else params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as any torch optimizer does; its options are checked."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        _powered.refresh()
        try:
            for parameter in param_group["params"]:
                _check_owners(parameter, param_group["alpha"])
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over another optimizer's state; options that it lacks stay this optimizer's own.

        So the state_dict of a torch.optim.SGD may be loaded, momentum and all.
        """
        own = {**state.get("defaults", getattr(self, "defaults", {}))}
        groups = [{**own, **group} for group in state.get("param_groups", [])]
        for group in groups:
            _check_options(group)
        super().__setstate__({**state, "param_groups": groups})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Looking for a weight's layers is nothing that a graph could hold. torch.optim's own way to say
    # so: torch.compiler.disable would import the compiler, and Triton, with this module.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure``, if given, computes the loss anew and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._look_at_layers()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _look_at_layers(self) -> None:
        """Before a step: which weights hold θ may be another matter than at the last one."""
        _powered.notice_exchanges()
        generation = _powered.generation()
        if self._agreed is generation:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                _check_owners(parameter, group["alpha"])
        self._agreed = generation

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not params:
            return
        lr, rule = float(group["lr"]), group["rule"]
        alphas = [_alpha(parameter, group["alpha"]) for parameter in params]
        grads = [_dense_grad(parameter) for parameter in params]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if rule == "chain":
            grads = [
                grad if alpha is None else phi_gradient(grad, theta, alpha)
                for grad, theta, alpha in zip(grads, params, alphas, strict=True)
            ]
        directions = self._directions(params, grads, group)
        plain = [i for i, alpha in enumerate(alphas) if alpha is None]
        if plain:
            torch._foreach_add_(
                [params[i] for i in plain], [directions[i] for i in plain], alpha=-lr
            )
        for theta, direction, alpha in zip(params, directions, alphas, strict=True):
            if alpha is not None:
                theta.copy_(moved(theta, direction, alpha, lr, rule))

    def _directions(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """The directions of SGD with momentum, which is kept as ``momentum_buffer``."""
        momentum = group["momentum"]
        if momentum == 0:
            return grads
        old = [i for i, p in enumerate(params) if self.state[p].get("momentum_buffer") is not None]
        if old:
            buffers = [self.state[params[i]]["momentum_buffer"] for i in old]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, [grads[i] for i in old], alpha=1 - group["dampening"])
        for i in set(range(len(params))) - set(old):
            self.state[params[i]]["momentum_buffer"] = grads[i].clone()
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in params]
        if group["nesterov"]:
            return list(torch._foreach_add(grads, buffers, alpha=momentum))
        return buffers


def _check_options(options: dict[str, Any]) -> None:
    check_rule("PowerSGD", options["rule"])
    if options.get("weight_decay"):
        raise TypeError(f"PowerSGD has no weight_decay, got {options['weight_decay']}")
    lr, momentum, dampening = (
        _finite(name, options[name]) for name in ("lr", "momentum", "dampening")
    )
    for name, value in (("lr", lr), ("momentum", momentum)):
        if value < 0:
            raise ValueError(f"PowerSGD: {name} must be a number >= 0, got {value}")
    if options["nesterov"] and (momentum <= 0 or dampening != 0):
        raise ValueError(
            "PowerSGD: nesterov needs momentum > 0 and dampening = 0, got "
            f"{options['momentum']} and {options['dampening']}"
        )
    alpha = options["alpha"]
    if isinstance(alpha, Tensor):
        alpha = alpha_tensor("PowerSGD", alpha, alpha.device).item()
    if alpha is not None:
        check_alpha("PowerSGD", alpha)


def _finite(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A scheduler may want the learning rate as a tensor.
    if not is_number and not (name == "lr" and isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"PowerSGD: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"PowerSGD: {name} must be a finite number, got {float(value)}")
    return float(value)


def _check_owners(parameter: Tensor, group_alpha: float | Tensor | None) -> None:
    """The layers that share ``parameter`` agree with each other, and with the group."""
    layers = _powered.layers_of(parameter)
    if layers and group_alpha is not None:
        raise ValueError(
            f"PowerSGD: a group with an alpha of its own has the weight of {layers[0]}, which has "
            "its layer's; put it into another group"
        )
    if len({(layer.stores, float(layer.alpha)) for layer in layers}) > 1:
        raise ValueError(
            f"PowerSGD: {' and '.join(map(str, layers))} share one weight, so they need the same "
            "alpha and stores"
        )


def _alpha(parameter: Tensor, group_alpha: float | Tensor | None) -> Tensor | None:
    """The exponent of a parameter that holds θ; None for one that takes the plain step."""
    layer = _powered.theta_layer(parameter)
    if layer is not None:
        alpha = layer.alpha
    elif group_alpha is None or _powered.layers_of(parameter):
        return None
    else:
        alpha = alpha_tensor("PowerSGD", group_alpha, parameter.device)
    # At α = 1 the powered step is the plain one; on a GPU, finding out would wait for it.
    return None if alpha.device.type == "cpu" and alpha.item() == 1 else alpha


def _dense_grad(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"PowerSGD: gradients must be dense, got {grad.layout} for a parameter of shape "
            f"{tuple(parameter.shape)}; use Embedding(sparse=False)"
        )
    return grad
