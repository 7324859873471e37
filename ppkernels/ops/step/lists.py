"""The reference over lists, in place: what every device gets that has no kernels of its own.

The functions have the signatures of the op's schemas (op.py). They check their tensors as the
kernels do, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppkernels._checks import alpha_tensor, check_like
from ppkernels.ops._bits import unpacked
from ppkernels.ops.step import reference

_HALF = (torch.bfloat16, torch.float16)
_OPTIONAL = ("momentum_buffers", "max_exp_avg_sqs", "masters", "masks", "holds_phi")


def _check_tensors(op: str, weights: list[Tensor], lists: dict[str, Sequence[Any]]) -> None:
    """As the compiled kernels check: an entry for each weight, shaped like it; or none at all."""
    for name, entries in lists.items():
        if len(entries) != len(weights) and (entries or name not in _OPTIONAL):
            raise ValueError(
                f"{op}: {name} must have an entry for each of the {len(weights)} weights, "
                f"got {len(entries)}"
            )
    for i, weight in enumerate(weights):
        check_like(op, "grads", lists["grads"][i], "its weight", weight)
        alpha_tensor(op, lists["alphas"][i], weight.device, "alphas")
        states = [
            (name, state)
            for name in ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
            if (state := _entry(lists.get(name, ()), i)) is not None
        ]
        for name, state in states:
            _check_state(op, name, state, weight)
            if state.dtype != states[0][1].dtype:
                raise TypeError(
                    f"{op}: the states of a weight must have one dtype, got {states[0][1].dtype} "
                    f"and {state.dtype}"
                )
        master = _entry(lists["masters"], i)
        if master is not None:
            _check_state(op, "masters", master, weight)
            is_wide = {master.dtype, *(state.dtype for _, state in states)} == {torch.float32}
            if weight.dtype not in _HALF or not is_wide:
                raise TypeError(
                    f"{op}: a master copy is float32 beside a half weight, with float32 states"
                )
    for step in lists.get("steps", ()):
        if step.dtype != torch.float32 or step.numel() != 1:
            raise TypeError(
                f"{op}: steps must be float32 tensors of one number, got {tuple(step.shape)} "
                f"{step.dtype}"
            )


def _check_state(op: str, name: str, state: Tensor, weight: Tensor) -> None:
    if state.shape != weight.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of its weight, {tuple(weight.shape)}, "
            f"got {tuple(state.shape)}"
        )
    if state.dtype != weight.dtype and (weight.dtype not in _HALF or state.dtype != torch.float32):
        raise TypeError(
            f"{op}: {name} must have the dtype of its weight, {weight.dtype}, or float32 where "
            f"that is a half type; got {state.dtype}"
        )


def _form(
    alpha: Tensor,
    holds_phi: int,
    lr: Tensor,
    words: tuple[Any, ...],
) -> reference.Form:
    weight_decay, decay, decay_of, rule, maximize, grad_scale, _ = words
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
    return reference.Form(
        float(alpha), bool(holds_phi), rule, float(lr), weight_decay, decay, decay_of, factor
    )


def _start(weight: Tensor, master: Tensor | None) -> Tensor:
    """What a step starts from: the master copy, where nobody has overwritten the weight since."""
    if master is None:
        return weight
    return torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype))


def _free(words: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if words is None else unpacked(words, weight.shape)


def _entry(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    """Entry ``i`` of a list that may be empty, and whose entries without elements say "none"."""
    return tensors[i] if tensors and tensors[i].numel() else None


def _overwrite(weight: Tensor, master: Tensor | None, free: Tensor | None, stepped: Tensor) -> None:
    if master is None:
        weight.copy_(stepped)
        return
    for tensor in (weight, master):
        moved = stepped.to(tensor.dtype)
        tensor.copy_(moved if free is None else torch.where(free, moved, tensor))


def sgd_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    masters: list[Tensor],
    masks: list[Tensor],
    alphas: list[Tensor],
    holds_phi: list[int],
    lr: Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    *words: Any,
) -> None:
    lists: dict[str, Sequence[Any]] = {"grads": grads, "alphas": alphas, "holds_phi": holds_phi}
    lists |= {"momentum_buffers": momentum_buffers, "masters": masters, "masks": masks}
    _check_tensors("sgd_step_", weights, lists)
    if words[-1] is not None and words[-1].item() != 0:
        return
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        master, free = _entry(masters, i), _free(_entry(masks, i), weight)
        buffer = momentum_buffers[i] if momentum_buffers else None
        form = _form(alphas[i], holds_phi[i] if holds_phi else 0, lr, words)
        stepped, averaged = reference.sgd_step(
            _start(weight, master), grad, buffer, free, form, momentum, dampening, nesterov
        )
        _overwrite(weight, master, free, stepped)
        if buffer is not None and averaged is not None:
            buffer.copy_(averaged)


def adam_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    masks: list[Tensor],
    alphas: list[Tensor],
    holds_phi: list[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    *words: Any,
) -> None:
    lists: dict[str, Sequence[Any]] = {"grads": grads, "alphas": alphas, "holds_phi": holds_phi}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    lists |= {"steps": steps, "masters": masters, "masks": masks}
    _check_tensors("adam_step_", weights, lists)
    if words[-1] is not None and words[-1].item() != 0:
        return
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        master, free = _entry(masters, i), _free(_entry(masks, i), weight)
        states = [exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sqs[i] if max_exp_avg_sqs else None]
        form = _form(alphas[i], holds_phi[i] if holds_phi else 0, lr, words)
        steps[i].add_(1)
        stepped, *moments = reference.adam_step(
            _start(weight, master),
            grad,
            exp_avgs[i],
            exp_avg_sqs[i],
            states[2],
            float(steps[i]),
            free,
            form,
            beta1,
            beta2,
            eps,
        )
        _overwrite(weight, master, free, stepped)
        for state, moment in zip(states, moments, strict=True):
            if state is not None and moment is not None:
                state.copy_(moment)
