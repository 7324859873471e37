"""`pp.report`: what the weights of a model are, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ppkernels._checks import check_model, check_numbers, check_whole
from ppkernels._powered import alpha_of_stored, is_powered
from ppkernels.ops import BitMask, Statistics
from ppkernels.sparsity.layers import unwrapped
from ppkernels.sparsity.listed import SPARSE, listed, sources_of, weight_of
from ppkernels.sparsity.seen import epsilon_text, seen


@dataclass(frozen=True)
class LayerReport:
    """The weight of one layer, or of all together, as the network sees it.

    Attributes:
        name: the layer's name in the model; ``"total"`` for all.
        tied: names of other layers that have the same weight.
        kind: the layer's class; empty for all.
        shape: of the weight, of a sparse layer that of the dense one; None for all.
        dtype: of the weight, ``"float32"`` say; where layers differ, None for all.
        alpha: α; None for a plain layer, and for all where they differ.
        stores: ``"theta"`` or ``"phi"``; None for a plain layer, and for all where they differ.
        kept: how many entries have θ ≠ 0.
        frozen: how many entries no step moves: the bit of ``update_mask`` is 0, a sparse layer does
            not store them, or no Parameter that the weight comes from requires a gradient.
        statistics: of θ, an entry that ``mask`` hides being 0; the histogram is from −m to m, m the
            largest |θ|; none for all.
        bytes_dense: entries · bytes of one.
        bytes_packed: kept · bytes of one + ⌈entries / 8⌉, the kept values and a mask of one bit an
            entry; ``bytes_dense`` where that is less.
    """

    name: str
    tied: tuple[str, ...]
    kind: str
    shape: tuple[int, ...] | None
    dtype: str | None
    alpha: float | None
    stores: str | None
    kept: int
    frozen: int
    statistics: Statistics
    bytes_dense: int
    bytes_packed: int

    @property
    def entries(self) -> int:
        """How many entries the weight has."""
        return self.statistics.count

    @property
    def share_kept(self) -> float:
        """kept / entries; NaN of no entries."""
        return self.kept / self.entries if self.entries else float("nan")

    @property
    def share_frozen(self) -> float:
        """frozen / entries; NaN of no entries."""
        return self.frozen / self.entries if self.entries else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """The numbers under their names, with shares; None where there is none of them."""
        found = self.statistics
        has_entries = self.entries > 0
        shares = {str(epsilon): found.share_below(epsilon) for epsilon in found.below}
        return {
            "name": self.name,
            "tied": list(self.tied),
            "kind": self.kind,
            "shape": None if self.shape is None else list(self.shape),
            "dtype": self.dtype,
            "alpha": self.alpha,
            "stores": self.stores,
            "entries": self.entries,
            "kept": self.kept,
            "share_kept": self.share_kept if has_entries else None,
            "frozen": self.frozen,
            "share_frozen": self.share_frozen if has_entries else None,
            "share_below": shares if has_entries else dict.fromkeys(shares),
            "min": found.min if has_entries else None,
            "max": found.max if has_entries else None,
            "mean": found.mean if has_entries else None,
            "mean_abs": found.mean_abs if has_entries else None,
            "bytes_dense": self.bytes_dense,
            "bytes_packed": self.bytes_packed,
        }


@dataclass(frozen=True)
class Report:
    """What `pp.report` found. ``str(report)`` is a table of what matters most, `as_dict` has all.

    Attributes:
        layers: one `LayerReport` for each weight, in the model's order.
        total: the same of all of them together.
        other_parameters: how many entries the model's other parameters have: biases, norms,
            embeddings, recurrent weights, the input projections of attention, and what a subclass
            of a layer has besides its weight.
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport
    other_parameters: int

    @property
    def epsilons(self) -> tuple[float, ...]:
        """The ε for which entries with |θ| < ε were counted."""
        return tuple(self.total.statistics.below)

    def __str__(self) -> str:
        from ppkernels.sparsity.table import report_table

        return report_table(self)

    def as_dict(self) -> dict[str, Any]:
        """All numbers but the histograms, as json.dumps takes them; each ε as a string."""
        return {
            "layers": [layer.as_dict() for layer in self.layers],
            "total": self.total.as_dict(),
            "other_parameters": self.other_parameters,
        }

    def plot(self, path: str | Path) -> None:
        """Draw a histogram of each layer's θ, and the shares, to the file ``path``.

        Of more than 24 layers the 24 largest are drawn.

        Raises:
            ImportError: there is no matplotlib.
            ValueError: the report was made with ``bins=0``.
        """
        from ppkernels.sparsity.plots import report_picture

        if not any(layer.statistics.histogram for layer in self.layers):
            raise ValueError("Report.plot: the report has no histograms; make it with bins > 0")
        report_picture(self, path)

    def to_tensorboard(self, writer: Any, step: int) -> None:
        """Add scalars, and the histograms of θ, to a torch.utils.tensorboard.SummaryWriter.

        The tags are ``kept``, ``frozen`` (shares), ``below_<ε>``, ``mean``, ``mean_abs`` and
        ``alpha``, each followed by ``/<layer>`` or ``/total``, and ``theta/<layer>``. The weights
        are not read again, nor copied.

        A report with ``bins=0`` has scalars alone.
        """
        for layer in (*self.layers, self.total):
            if layer.entries == 0:
                continue
            found = layer.statistics
            scalars = {"kept": layer.share_kept, "frozen": layer.share_frozen}
            for epsilon in found.below:
                scalars[f"below_{epsilon_text(epsilon)}"] = found.share_below(epsilon)
            scalars |= {"mean": found.mean, "mean_abs": found.mean_abs}
            if layer.alpha is not None:
                scalars["alpha"] = layer.alpha
            for tag, value in scalars.items():
                writer.add_scalar(f"{tag}/{layer.name}", value, step)
            if found.range is not None:
                writer.add_histogram_raw(
                    f"theta/{layer.name}",
                    min=found.min,
                    max=found.max,
                    num=found.count,
                    sum=found.sum,
                    sum_squares=found.sum_square,
                    bucket_limits=list(found.edges[1:]),
                    bucket_counts=list(found.histogram),
                    global_step=step,
                )


def report(
    model: nn.Module, epsilons: Iterable[float] = (1e-3, 1e-2), *, bins: int = 101
) -> Report:
    """What the weights of ``model`` are, layer by layer: kept, frozen, small, their size in bytes.

    Listed are powered and sparse layers, and all others of the classes nn.Linear and nn.Conv*,
    transposed ones and subclasses included, masked or plain. All numbers are of θ as the network
    sees it: powered, and 0 where a mask hides it or a sparse layer does not store it. A weight that
    layers share comes once, under the first one's name. DistributedDataParallel, DataParallel and
    torch.compile around the model are looked through.
    Nothing of the model changes: a parametrized weight is computed as in evaluation.

    Each weight is read twice: for the extremes, sums and counts, and for the histogram, whose range
    the first pass finds; once with ``bins=0``. θ is not written anywhere. A GPU is waited for.

    Args:
        model: any module, or a layer.
        epsilons: the ε > 0 for which entries with |θ| < ε are counted; each once.
        bins: bins of each histogram; an odd number has 0 in the middle of one.

    Returns:
        a `Report`, which keeps nothing of the model: ``print(report)``, ``.as_dict()``,
        ``.plot(path)``, ``.to_tensorboard(writer, step)``.

    Raises:
        TypeError: no module; ε or bins that are no numbers; a weight that is sharded (DTensor), or
            of a dtype that has no kernels, whose layer the error names.
        ValueError: no such layer; an ε that is not positive; negative bins; a weight without values
            (lazy, or on the meta device), with NaN or infinity in it, or, with bins, so large that
            no histogram is as wide; the error names the layer.

    Example::

        print(pp.report(model))
    """
    check_model("report", model)
    limits = tuple(dict.fromkeys(check_numbers("report", "epsilons", epsilons)))
    for epsilon in limits:
        if not 0 < epsilon < math.inf:
            raise ValueError(f"report: epsilons must be finite and > 0, got {epsilon}")
    bins = check_whole("report", "bins", bins, at_least=0)
    model = unwrapped(model)
    found: dict[int, tuple[str, nn.Module, Tensor, list[str]]] = {}
    own: set[int] = set()
    for name, layer in listed(model):
        weight, sources = weight_of(name, layer), sources_of(layer)
        # What the weight comes from is a parameter of its own under torch.nn.utils.
        is_own = any(each is weight for each in sources)
        key = id(weight) if is_own else id(layer)
        own |= set(map(id, sources))
        if key in found:
            found[key][3].append(name)
        else:
            found[key] = (name, layer, weight, [])
    if not found:
        raise ValueError(
            f"report: {type(model).__name__} holds no powered, linear or convolution layer"
        )
    layers = tuple(
        _layer_report(name, layer, weight, tuple(tied), limits, bins)
        for name, layer, weight, tied in found.values()
    )
    others = sum(p.numel() for p in model.parameters() if id(p) not in own and not is_lazy(p))
    return Report(layers, _total(layers), others)


def _layer_report(
    name: str,
    layer: nn.Module,
    weight: Tensor,
    tied: tuple[str, ...],
    epsilons: Sequence[float],
    bins: int,
) -> LayerReport:
    powered = layer if is_powered(layer) else None
    mask, update_mask = (_mask_of(layer, each) for each in ("mask", "update_mask"))
    topology = layer.topology if isinstance(layer, SPARSE) else None
    shape = weight.shape if topology is None else topology.shape
    entries, size = math.prod(shape), weight.element_size()
    alpha = alpha_of_stored(layer)
    found, zeros = seen(name, weight.detach(), alpha, mask, epsilons, bins, entries)
    sources: Sequence[Tensor] = sources_of(layer) or [weight]
    is_trained = any(source.requires_grad for source in sources)
    trained = (weight.numel() if update_mask is None else update_mask.count()) * is_trained
    kept = entries - zeros
    return LayerReport(
        name=name,
        tied=tied,
        kind=type(layer).__name__,
        shape=tuple(shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        alpha=None if powered is None else float(powered.alpha),
        stores=None if powered is None else powered.stores,
        kept=kept,
        frozen=entries - trained,
        statistics=found,
        bytes_dense=entries * size,
        bytes_packed=min(kept * size + (entries + 7) // 8, entries * size),
    )


def _mask_of(layer: nn.Module, name: str) -> BitMask | None:
    mask = getattr(layer, name, None)
    return mask if isinstance(mask, BitMask) else None


def _total(layers: Sequence[LayerReport]) -> LayerReport:
    def common(values: list[Any]) -> Any:
        return values[0] if len(set(values)) == 1 else None

    return LayerReport(
        name="total",
        tied=(),
        kind="",
        shape=None,
        dtype=common([layer.dtype for layer in layers]),
        alpha=common([layer.alpha for layer in layers]),
        stores=common([layer.stores for layer in layers]),
        kept=sum(layer.kept for layer in layers),
        frozen=sum(layer.frozen for layer in layers),
        statistics=Statistics.combined(
            replace(layer.statistics, histogram=(), range=None) for layer in layers
        ),
        bytes_dense=sum(layer.bytes_dense for layer in layers),
        bytes_packed=sum(layer.bytes_packed for layer in layers),
    )
