"""`reestimate_batch_norm`: the statistics of normalisation layers, measured anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ppkernels._checks import check_model


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> None:
    """Measure the running statistics of every norm layer anew, as the mean over ``batches``.

    For a network that was pruned, whose activations are no longer those that the statistics
    describe. Every nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm and nn.InstanceNorm1d/2d/3d with running
    statistics starts afresh, and each batch counts alike, a smaller last one too. All other
    modules, dropout among them, are in eval mode meanwhile (torch.optim.swa_utils.update_bn has
    them in training mode). Modes come back as they were; parameters and the layers' own momentum
    do not change. A model without such layers is left as it is, and no batch is asked for.

    Where a model is trained by several processes (DistributedDataParallel), each measures its own
    batches, but for nn.SyncBatchNorm, whose means over a batch are those of all. So give every
    process the same batches, or copy the buffers of one to the others (torch.distributed.broadcast)
    before anything depends on them.

    Args:
        model: any module, wrapped or not.
        batches: tensors, or tuples or lists whose first element is the model's input: a DataLoader,
            say. The input is moved to the device of the statistics.
        forward: runs a batch of any kind through the model: ``lambda model, batch:
            model(batch["image"].cuda())``. By default ``model(input)``.

    Raises:
        ValueError: no batches; a lazy norm layer that has seen none.
        TypeError: a batch of another kind, without ``forward``. After any error, one of the model's
            own included, statistics and modes are what they were.

    Example::

        pruner.prune()
        pp.sparsity.reestimate_batch_norm(model, itertools.islice(loader, 100))
    """
    check_model("reestimate_batch_norm", model)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    ]
    if not layers:
        return
    for layer in layers:
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(
                f"reestimate_batch_norm: a {type(layer).__name__} is lazy; run a batch through the "
                "model first"
            )
    device = next(layers[0].buffers()).device
    seen = 0
    with torch.no_grad(), _measuring(model, layers):
        for batch in batches:
            for layer in layers:
                if isinstance(layer, _InstanceNorm):
                    layer.momentum = 1 / (seen + 1)
            if forward is not None:
                forward(model, batch)
            else:
                model(_input_of(batch).to(device))
            seen += 1
        if not seen:
            raise ValueError("reestimate_batch_norm: batches must be at least one, got none")


def _input_of(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            "reestimate_batch_norm: a batch must be a tensor, or a tuple or list that begins with "
            f"one, got {type(batch).__name__}; for batches of other kinds give forward="
        )
    return first


@contextmanager
def _measuring(model: nn.Module, layers: list[_NormBase]) -> Iterator[None]:
    """``layers`` average from now on, and all else is in eval mode; modes come back in the end.

    Statistics come back too, if there is an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [{name: value.clone() for name, value in _statistics(layer)} for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            # The cumulative average; to an instance norm it would mean no average at all.
            layer.momentum = None
            layer.train()
        yield
    except BaseException:
        for layer, values in zip(layers, before, strict=True):
            for name, value in _statistics(layer):
                value.copy_(values[name])
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _statistics(layer: _NormBase) -> list[tuple[str, Tensor]]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [(name, value) for name in names if isinstance(value := getattr(layer, name), Tensor)]
