"""`pp.footprint`: the bytes of a model and its optimizer, beside those of the dense one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ppkernels._checks import check_model
from ppkernels._optimizers import innermost, optimizers_of
from ppkernels._powered import is_sparse
from ppkernels._text import bytes_text, percent_text, table
from ppkernels.nn.checkpoint import INDICES
from ppkernels.nn.sparse_folded import FoldedSparse
from ppkernels.ops import BitMask

# The buffers of a `FoldedSparse` that are parameters and indices elsewhere.
_FOLDED = ("weight", "bias", *INDICES)


@dataclass(frozen=True)
class LayerFootprint:
    """The bytes of one module, without those in it, or of all together.

    Attributes:
        name: the module's name in the model; ``"total"`` for all.
        kind: its class; empty for all.
        entries, kept: how many entries its parameters would have dense, and how many they have.
        weights: bytes of parameters, and of what `pp.fold` has made of them.
        indices: where kept values stand, the transposed indices of a backward included once they
            are made.
        masks: bits of ``update_mask`` and ``mask``.
        buffers: statistics of norms and the like.
        state: what optimizers keep of the parameters.
        disk: the tensors of its state_dict, as torch.save writes them; without the headers of the
            file, some hundred bytes a tensor.
        dense, dense_state, dense_disk: what the same module would need dense and without masks: in
            memory (weights and buffers), for the optimizer's state, and on disk.
    """

    name: str
    kind: str
    entries: int = 0
    kept: int = 0
    weights: int = 0
    indices: int = 0
    masks: int = 0
    buffers: int = 0
    state: int = 0
    disk: int = 0
    dense: int = 0
    dense_state: int = 0
    dense_disk: int = 0

    @property
    def memory(self) -> int:
        """All bytes in memory, gradients and activations excluded."""
        return self.weights + self.indices + self.masks + self.buffers + self.state

    @property
    def dense_memory(self) -> int:
        """All bytes in memory of the dense module and the state of its optimizer."""
        return self.dense + self.dense_state


@dataclass(frozen=True)
class Footprint:
    """What `pp.footprint` found; ``str(footprint)`` is a table.

    Attributes:
        layers: a `LayerFootprint` for each module with parameters or buffers of its own, in the
            model's order; at the end, if there is any, the state of parameters that the model has
            not, ``"(others)"``.
        total: all of them together.
    """

    layers: tuple[LayerFootprint, ...]
    total: LayerFootprint

    def __str__(self) -> str:
        headings = ["layer", "kept", "weights", "indices", "masks", "state"]
        headings += ["memory", "dense", "disk", "dense"]
        rows = [_cells(layer) for layer in self.layers]
        return "\n".join([*table(headings, rows, _cells(self.total)), "", *_LEGEND])


_LEGEND = (
    "memory: weights, indices, masks, buffers and the optimizer's state, without gradients.",
    "disk: the state_dict. kept: what is stored. dense: the same model dense and without masks.",
)


def footprint(
    model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None
) -> Footprint:
    """The bytes of ``model`` in memory and on disk, module by module, beside those of a dense one.

    Counted are parameters, indices of sparse layers, masks, buffers, and what optimizers keep of
    the parameters; not gradients and activations. What several modules share comes once, with the
    first. Nothing of the model is read or changed but sizes.

    Args:
        model: any module, with sparse layers or without.
        optimizer: the optimizer that trains it, or several; their state exists after a step.

    Returns:
        a `Footprint`: ``print(footprint)``, ``.layers``, ``.total``.

    Raises:
        TypeError: no module; an optimizer of another kind.
        ValueError: a lazy parameter, which has no size yet.

    Example::

        found = pp.footprint(model, optimizer)
        print(found)
        assert found.total.memory < 0.3 * found.total.dense_memory
    """
    check_model("footprint", model)
    optimizers = [*map(innermost, optimizers_of("footprint", optimizer))]
    seen: set[int] = set()
    layers = []
    for name, module in model.named_modules():
        row = _row(name, module, optimizers, seen)
        if row != LayerFootprint(row.name, row.kind):
            layers.append(row)
    others = sum(
        _state_bytes(state)
        for each in optimizers
        for parameter, state in each.state.items()
        if id(parameter) not in seen
    )
    if others:
        layers.append(LayerFootprint("(others)", "", state=others, dense_state=others))
    return Footprint(tuple(layers), _total(layers))


def _row(
    name: str, module: nn.Module, optimizers: list[Optimizer], seen: set[int]
) -> LayerFootprint:
    row = LayerFootprint(name or type(module).__name__, type(module).__name__)
    for key, parameter in module._parameters.items():
        if parameter is None or id(parameter) in seen:
            continue
        if is_lazy(parameter):
            raise ValueError(
                f"footprint: {name!r} ({type(module).__name__}) is lazy; run a batch through the "
                "model first"
            )
        seen.add(id(parameter))
        row = _with_parameter(row, module, key, parameter, optimizers)
    for key, buffer in module._buffers.items():
        if buffer is not None and id(buffer) not in seen:
            seen.add(id(buffer))
            row = _with_buffer(row, module, key, buffer)
    masks = sum(_bytes(mask.words) for mask in _masks(module))
    row = replace(row, masks=masks, disk=row.disk + masks)
    if is_sparse(module):
        found = module.topology
        saved = _bytes(found.offsets) + _bytes(found.columns)
        row = replace(row, indices=found.nbytes, disk=row.disk + saved)
    return row


def _with_buffer(
    row: LayerFootprint, module: nn.Module, key: str, buffer: Tensor
) -> LayerFootprint:
    size = _bytes(buffer)
    saved = 0 if key in module._non_persistent_buffers_set else size
    row = replace(row, disk=row.disk + saved)
    if not isinstance(module, FoldedSparse) or key not in _FOLDED:
        row = replace(row, dense_disk=row.dense_disk + saved)
        return replace(row, buffers=row.buffers + size, dense=row.dense + size)
    if key in INDICES:
        return replace(row, indices=row.indices + size)
    entries = module.shape.numel() if key == "weight" else buffer.numel()
    dense = entries * buffer.element_size()
    return replace(
        row,
        entries=row.entries + entries,
        kept=row.kept + buffer.numel(),
        weights=row.weights + size,
        dense=row.dense + dense,
        dense_disk=row.dense_disk + dense,
    )


def _with_parameter(
    row: LayerFootprint,
    module: nn.Module,
    key: str,
    parameter: nn.Parameter,
    optimizers: list[Optimizer],
) -> LayerFootprint:
    entries = kept = parameter.numel()
    if is_sparse(module) and key == "weight":
        entries = module.topology.numel()
    size, state, dense_state = _bytes(parameter), 0, 0
    for each in optimizers:
        for tensor in _tensors(each.state.get(parameter, {})):
            bytes_ = _bytes(tensor)
            is_each = tensor.shape == parameter.shape
            state += bytes_
            dense_state += entries * tensor.element_size() if is_each else bytes_
    dense = entries * parameter.element_size()
    return replace(
        row,
        entries=row.entries + entries,
        kept=row.kept + kept,
        weights=row.weights + size,
        state=row.state + state,
        disk=row.disk + size,
        dense=row.dense + dense,
        dense_state=row.dense_state + dense_state,
        dense_disk=row.dense_disk + dense,
    )


def _masks(module: nn.Module) -> Iterator[BitMask]:
    for name in ("update_mask", "mask"):
        mask = getattr(module, name, None)
        if isinstance(mask, BitMask):
            yield mask


def _tensors(state: Any) -> Iterator[Tensor]:
    """All tensors in an optimizer's state of one parameter, those in lists included."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _state_bytes(state: Any) -> int:
    return sum(map(_bytes, _tensors(state)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _total(layers: Iterable[LayerFootprint]) -> LayerFootprint:
    rows = list(layers)
    sums = {
        field.name: sum(getattr(row, field.name) for row in rows)
        for field in fields(LayerFootprint)
        if field.type == "int"
    }
    return LayerFootprint("total", "", **sums)


def _cells(row: LayerFootprint) -> list[str]:
    share = row.kept / row.entries if row.entries else float("nan")
    sizes = (row.weights, row.indices, row.masks, row.state, row.memory, row.dense_memory)
    return [
        row.name,
        percent_text(share),
        *(bytes_text(size) if size else "-" for size in (*sizes, row.disk, row.dense_disk)),
    ]
