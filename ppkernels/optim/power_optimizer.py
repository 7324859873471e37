"""What the Power optimizers share: which weights hold θ, options, checkpoints, the step around."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal, get_args, overload
from weakref import ref

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ppkernels import _powered
from ppkernels._checks import alpha_tensor, check_alpha, check_no_grad, check_word, is_captured
from ppkernels.optim.batch import Batch, batch_of, check_owners

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Rule = Literal["virtual", "chain"]
Decay = Literal["coupled", "decoupled"]
DecayOf = Literal["theta", "phi"]
# Loss scale, and the number that is not 0 where a gradient is not finite: a GradScaler's.
Scaling = tuple[Tensor | None, Tensor | None]

_WORDS = {"rule": get_args(Rule), "decay": get_args(Decay), "decay_of": get_args(DecayOf)}

_HALF = (torch.bfloat16, torch.float16)

# What the fused step takes for "no master copy".
_NO_MASTER = torch.empty(0, device="cpu")


class PowerOptimizer(Optimizer):
    """The part of an optimizer that knows layers, options and checkpoints; see its subclasses."""

    # For the hook that refuses other optimizers, and for torch.amp.GradScaler: unscaling the
    # gradients and skipping the step are part of the fused pass.
    steps_theta = True
    _step_supports_amp_scaling = True

    # The registry's generation when the layers that share a weight were last found to agree.
    _agreed: object = None

    def __init__(self, params: nn.Module | Parameters, defaults: dict[str, Any]) -> None:
        self._batches: dict[int, list[Batch]] = {}
        # The registry of layers is weak: the weight of a layer that is gone looks like a plain
        # parameter. So for each parameter a weak reference to the layer that last owned it.
        self._owners = WeakIdKeyDictionary()
        super().__init__(
            params.parameters() if isinstance(params, nn.Module) else params,
            {**defaults, "alpha": None},
        )

    # ---- for subclasses

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise unless ``options`` are those of a group; a subclass adds its own."""
        name = type(self).__name__
        lr, decay = (
            self.check_number(option, options[option], at_least=0)
            for option in ("lr", "weight_decay")
        )
        for option, words in _WORDS.items():
            check_word(name, option, options[option], *words)
        if options["decay"] == "decoupled" and lr * decay >= 1:
            raise ValueError(
                f"{name}: decoupled decay multiplies weights by 1 - lr * weight_decay, which must "
                f"be positive; got lr {lr} and weight_decay {decay}"
            )
        alpha = options["alpha"]
        if isinstance(alpha, Tensor):
            alpha = alpha_tensor(name, alpha, alpha.device).item()
        if alpha is not None:
            check_alpha(name, alpha)

    def check_number(
        self, name: str, value: Any, *, at_least: float = -math.inf, below: float = math.inf
    ) -> float:
        """``value`` as a float; an error unless it is a finite number in [at_least, below)."""
        optimizer = type(self).__name__
        if name == "lr" and isinstance(value, Tensor):  # as a scheduler may want it
            if value.numel() != 1 or not value.is_floating_point():
                raise TypeError(
                    f"{optimizer}: lr as a tensor must hold one floating-point number, got "
                    f"{tuple(value.shape)} {value.dtype}"
                )
            check_no_grad(optimizer, "lr", value)
            value = value.item()
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{optimizer}: {name} must be a number, got {value!r}")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{optimizer}: {name} must be a finite number, got {number}")
        if not at_least <= number < below:
            wanted = f">= {at_least}" + (f" and < {below}" if below < math.inf else "")
            raise ValueError(f"{optimizer}: {name} must be a number {wanted}, got {number}")
        return number

    def step_batch(
        self, group: dict[str, Any], batch: Batch, grads: list[Tensor], scaling: Scaling
    ) -> None:
        """Take the fused step for the parameters of ``batch``.

        Args:
            group: the options.
            batch: the parameters and how each is stepped.
            grads: their gradients.
            scaling: the loss scale and the number that is not 0 where a gradient is not finite, as
                a GradScaler gives them, or None.
        """
        raise NotImplementedError

    def check_state_may_begin(self, parameter: Tensor) -> None:
        """Raise if a CUDA graph is being captured: its replays would all begin with a new state."""
        if is_captured(parameter.device):
            raise RuntimeError(
                f"{type(self).__name__}: the state of a parameter of shape "
                f"{tuple(parameter.shape)} would be made anew at every replay of the CUDA graph; "
                "take a step before the capture begins"
            )

    def zero_state(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """A new state for ``parameter``: float32 beside a master copy, else of its own dtype."""
        self.check_state_may_begin(parameter)
        is_wide = group["master_weights"] and parameter.dtype in _HALF
        dtype = torch.float32 if is_wide else parameter.dtype
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    def masters(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """The float32 master copies of ``params``; where one is made, states become float32 too."""
        if not group["master_weights"]:
            return []
        masters = []
        for parameter in params:
            if parameter.dtype not in _HALF:
                masters.append(_NO_MASTER)
                continue
            state = self.state[parameter]
            if _powered.MASTER not in state:
                self.check_state_may_begin(parameter)
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dtype == parameter.dtype:
                        state[name] = value.to(torch.float32)
                state[_powered.MASTER] = parameter.detach().to(torch.float32)
            masters.append(state[_powered.MASTER])
        return masters

    # ---- torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as any torch optimizer does; its options are checked."""
        self.check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        _powered.refresh()
        try:
            for parameter in param_group["params"]:
                check_owners(type(self).__name__, parameter, param_group["alpha"])
                self._remember(parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over another optimizer's state; options that a group lacks stay as they are here.

        So the state_dict of the torch optimizer of the same formula may be loaded, state and all.
        """
        for values in state.get("state", {}).values():
            # torch.optim.SGD without momentum.
            if isinstance(values, dict) and values.get("momentum_buffer", values) is None:
                del values["momentum_buffer"]
        saved = state.get("param_groups", [])
        if "defaults" in state:  # a copy, or out of a pickle
            own = [state["defaults"]] * len(saved)
        else:
            # torch adds to the defaults what the groups do not have.
            own = [
                {key: group[key] for key in self.defaults if key in group}
                for group in self.param_groups
            ]
        groups = [
            {**options, **self.translated(group)} for options, group in zip(own, saved, strict=True)
        ]
        for group in groups:
            self.check_options(group)
        self._batches = {}
        if "_owners" not in self.__dict__:
            self._owners = WeakIdKeyDictionary()
        super().__setstate__({**state, "param_groups": groups})

    def translated(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of another optimizer's ``group`` in this one's words."""
        return group

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any torch optimizer; float32 states beside half weights stay float32."""
        loaded = [state_dict]
        # The last hook, so that it sees the dict that the user's own hand on.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        state_dict = loaded[-1]
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, own, strict=True):
            # The base class has cast them to the parameter's dtype.
            for name, value in state_dict["state"].get(key, {}).items():
                is_wide = isinstance(value, Tensor) and value.dtype == torch.float32
                if is_wide and name != "step" and parameter.dtype in _HALF:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)
            if "step" in (state := self.state.get(parameter, {})):
                # torch counts in the default dtype, on the CPU if it pleases; once in numbers.
                step = torch.as_tensor(state["step"], dtype=torch.float32)
                state["step"] = step.to(parameter.device).reshape(())

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
        # Attributes that a GradScaler sets for the time of the call.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # All that is refused is found before anything is changed.
        steps = []
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            for batch in self._batches_of(group, params):
                batch.check_states(self)
                steps.append((group, batch, _grads_of(type(self).__name__, batch.params)))
        for group, batch, grads in steps:
            device = batch.params[0].device
            scaling = (_on(device, grad_scale), _on(device, found_inf))
            self.step_batch(group, batch, grads, scaling)
        return loss

    # ---- layers

    def _look_at_layers(self) -> None:
        """Before a step: which weights hold θ may be another matter than at the last one."""
        _powered.notice_exchanges()
        generation = _powered.generation()
        if self._agreed is generation:
            return
        may_ask = True
        for group in self.param_groups:
            for parameter in group["params"]:
                check_owners(type(self).__name__, parameter, group["alpha"])
                self._remember(parameter)
                # There no values were compared.
                may_ask &= not is_captured(parameter.device)
        self._agreed = generation if may_ask else None

    def _remember(self, parameter: Tensor) -> None:
        """Note which layer owns ``parameter`` now; that of one that is gone stays noted."""
        layers = _powered.powered_layers_of(parameter)
        if layers:
            self._owners[parameter] = ref(layers[0])
        elif parameter in self._owners and self._owners[parameter]() is not None:
            del self._owners[parameter]  # the layer was folded, or has another weight

    def _check_not_orphaned(self, parameter: Tensor) -> None:
        """The layer that last owned ``parameter`` is alive, or it has none."""
        is_gone = parameter in self._owners and self._owners[parameter]() is None
        if is_gone and not _powered.powered_layers_of(parameter):
            raise RuntimeError(
                f"{type(self).__name__}: the powered layer whose weight of shape "
                f"{tuple(parameter.shape)} is to be stepped is gone, and its exponent with it; "
                "keep the model alive while its optimizer steps"
            )

    def _batches_of(self, group: dict[str, Any], params: list[Tensor]) -> list[Batch]:
        """The group's parameters with a gradient, one batch for each device."""
        known = self._batches.get(id(group))
        if known is not None and len(known) == 1 and known[0].is_for(params, group["alpha"]):
            return known
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter in params:
            self._check_not_orphaned(parameter)
            by_device.setdefault(parameter.device, []).append(parameter)
        name = type(self).__name__
        batches = [batch_of(name, some, group["alpha"]) for some in by_device.values()]
        self._batches[id(group)] = batches
        return batches


def shared_options(batch: Batch, group: dict[str, Any], scaling: Scaling) -> dict[str, Any]:
    """What the fused steps of all optimizers take of a batch, its group and a GradScaler."""
    words = ("weight_decay", "decay", "decay_of", "rule", "maximize")
    return {
        "masks": batch.masks,
        "alphas": batch.alphas,
        "holds_phi": batch.holds_phi,
        "lr": _rate_on(batch.params[0].device, group["lr"]),
        "grad_scale": scaling[0],
        "found_inf": scaling[1],
        **{word: group[word] for word in words},
    }


def _rate_on(device: torch.device, lr: float | Tensor) -> float | Tensor:
    """A learning rate as the fused step takes it for weights on ``device``."""
    if not isinstance(lr, Tensor):
        return lr
    if lr.dtype not in (torch.float32, torch.float64):
        lr = lr.double()
    # One on the CPU is read there.
    return lr if lr.device.type == "cpu" else lr.to(device)


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return number if number is None or number.device == device else number.to(device)


def _grads_of(optimizer: str, params: list[Tensor]) -> list[Tensor]:
    """The gradients of ``params``, all dense and of their parameter's dtype."""
    grads: list[Any] = [parameter.grad for parameter in params]
    unlike = any(
        grad.dtype is not parameter.dtype or grad.layout is not torch.strided
        for grad, parameter in zip(grads, params, strict=True)
    )
    return [_dense_grad(optimizer, parameter) for parameter in params] if unlike else grads


def _dense_grad(optimizer: str, parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{optimizer}: gradients must be dense, got {grad.layout} for a parameter of shape "
            f"{tuple(parameter.shape)}; use Embedding(sparse=False)"
        )
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)
