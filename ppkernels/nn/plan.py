"""`SparsifyPlan`: which layers of a model are sparse, and why; as a table, and as a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ppkernels._text import percent_text, shape_text, table

Choice = Literal["sparse", "dense"]

_FORMAT = "ppkernels.SparsifyPlan"
_VERSION = 1


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a `SparsifyPlan`.

    Attributes:
        name: the layer's name in the model.
        kind: the class that it had; of a layer that was sparse already, the one that `pp.densify`
            gives it.
        shape: of its weight, [N, K] or [N, C, H, W]; empty where it has none yet.
        kept: how many entries of the weight are kept, all of them where it is not pruned.
        inputs: the shapes of what the layer was called with, each once; empty where it was not
            called, or nobody looked.
        calls: how often it was called in one forward.
        dense_ms, sparse_ms: milliseconds of all its calls; None where nothing was measured.
        choice: ``"sparse"`` or ``"dense"``.
        reason: why, in words.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    kept: int
    inputs: tuple[tuple[int, ...], ...]
    calls: int
    dense_ms: float | None
    sparse_ms: float | None
    choice: Choice
    reason: str

    @property
    def entries(self) -> int:
        """How many entries the weight has."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def share_kept(self) -> float:
        """kept / entries; NaN of no entries."""
        return self.kept / self.entries if self.entries else math.nan

    @property
    def speedup(self) -> float:
        """dense_ms / sparse_ms; NaN where nothing was measured."""
        if self.dense_ms is None or self.sparse_ms is None:
            return math.nan
        return self.dense_ms / self.sparse_ms if self.sparse_ms else math.inf


@dataclass(frozen=True)
class SparsifyPlan:
    """What `pp.sparsify` has chosen for each linear and convolution layer, and why.

    ``str(plan)`` is a table. Given to `pp.sparsify` it makes the same layers of another copy of the
    model sparse, on any machine, without measuring anything.

    Attributes:
        layers: a `PlannedLayer` for each layer, in the model's order.
        training: whether forward and backward were measured, or the forward alone.
        at_least: how many times faster a layer had to be.
        threads: torch's threads when it was measured.
        cpu: what `pp.cpu_capability` said then.
    """

    layers: tuple[PlannedLayer, ...]
    training: bool
    at_least: float
    threads: int
    cpu: str

    @property
    def sparse(self) -> tuple[str, ...]:
        """The names of the layers that are sparse."""
        return tuple(layer.name for layer in self.layers if layer.choice == "sparse")

    def __str__(self) -> str:
        headings = ["layer", "shape", "kept", "input", "dense", "sparse", "times", "choice"]
        rows = [_cells(layer, self.at_least) for layer in self.layers]
        what = "forward and backward" if self.training else "forward"
        asked = f"; {self.at_least:g} times are asked for" if self.at_least != 1 else ""
        legend = (
            f"dense, sparse: milliseconds, {what}, of all calls in one forward of the model,",
            f"by {self.threads} threads ({self.cpu}). times: dense / sparse{asked}.",
        )
        return "\n".join([*table(headings, rows, words=("shape", "input", "choice")), "", *legend])

    # ---- as a file

    def save(self, path: str | Path) -> None:
        """Write the plan to the file ``path``, as JSON."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SparsifyPlan:
        """The plan that `save` has written to the file ``path``.

        Raises:
            ValueError: the file is no such plan, or one of another version.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"SparsifyPlan.load: {path} is no JSON: {error}") from None
        try:
            return _read(content)
        except ValueError as error:
            raise ValueError(f"SparsifyPlan.load: {path}: {error}") from None


def _cells(layer: PlannedLayer, at_least: float) -> list[str]:
    times = [layer.dense_ms, layer.sparse_ms]
    is_measured = None not in times
    return [
        layer.name or layer.kind,
        shape_text(layer.shape),
        percent_text(layer.share_kept),
        _inputs_text(layer),
        *("-" if ms is None else f"{ms:.3f}" for ms in times),
        f"{layer.speedup:.2f}" if is_measured else "-",
        _choice_text(layer, at_least) if is_measured else f"{layer.choice}: {layer.reason}",
    ]


def _choice_text(layer: PlannedLayer, at_least: float) -> str:
    """What was measured stands in columns of its own."""
    if layer.choice == "sparse":
        return layer.choice
    return "dense: faster" if layer.speedup < 1 else f"dense: not {at_least:g} times slower"


def _inputs_text(layer: PlannedLayer) -> str:
    if not layer.inputs:
        return "-"
    more = f" +{len(layer.inputs) - 1} more" if len(layer.inputs) > 1 else ""
    times = f", {layer.calls} calls" if layer.calls > 1 else ""
    return shape_text(layer.inputs[0]) + more + times


# ---- what a file must hold


def _read(content: Any) -> SparsifyPlan:
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != _FORMAT:
        raise ValueError(f"format must be {_FORMAT!r}, got {found!r}")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"version must be {_VERSION}, which this ppkernels reads, got "
            f"{content.get('version')!r}"
        )
    own = {key: value for key, value in content.items() if key not in ("format", "version")}
    _check_keys("the plan", own, SparsifyPlan)
    if not isinstance(own["layers"], list):
        raise ValueError(f"layers must be a list, got {own['layers']!r}")
    layers = tuple(_read_layer(index, layer) for index, layer in enumerate(own["layers"]))
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError("layers must have different names")
    _check("training", own["training"], isinstance(own["training"], bool), "a bool")
    _check("at_least", own["at_least"], _is_number(own["at_least"]), "a number >= 0")
    _check("threads", own["threads"], _is_count(own["threads"]), "a whole number")
    _check("cpu", own["cpu"], isinstance(own["cpu"], str), "a string")
    return SparsifyPlan(**{**own, "layers": layers})


def _read_layer(index: int, content: Any) -> PlannedLayer:
    at = f"layers[{index}]"
    _check(at, content, isinstance(content, dict), "an object")
    _check_keys(at, content, PlannedLayer)
    for name in ("name", "kind", "reason"):
        _check(f"{at}.{name}", content[name], isinstance(content[name], str), "a string")
    for name in ("kept", "calls"):
        _check(f"{at}.{name}", content[name], _is_count(content[name]), "a whole number")
    for name in ("dense_ms", "sparse_ms"):
        is_good = content[name] is None or _is_number(content[name])
        _check(f"{at}.{name}", content[name], is_good, "a number >= 0, or null")
    choices = get_args(Choice)
    _check(f"{at}.choice", content["choice"], content["choice"] in choices, f"one of {choices}")
    _check(f"{at}.shape", content["shape"], _is_shape(content["shape"]), "a list of sizes")
    inputs = content["inputs"]
    is_good = isinstance(inputs, list) and all(map(_is_shape, inputs))
    _check(f"{at}.inputs", inputs, is_good, "a list of shapes")
    layer = PlannedLayer(
        **{**content, "shape": tuple(content["shape"]), "inputs": tuple(map(tuple, inputs))}
    )
    _check(f"{at}.kept", layer.kept, layer.kept <= layer.entries, f"at most {layer.entries}")
    return layer


def _check(name: str, value: Any, is_good: bool, wanted: str) -> None:
    if not is_good:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _check_keys(name: str, content: dict[str, Any], of: type[Any]) -> None:
    wanted = [field.name for field in fields(of)]
    if set(content) != set(wanted):
        raise ValueError(f"{name} must have the keys {wanted}, got {list(content)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))
