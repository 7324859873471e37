"""One tensor, a list of them or a mapping: what an op on several takes, and gives back alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Many:
    """The tensors of an argument, what errors call them, and the form they came in.

    Attributes:
        names: ``tensor``, or ``tensors[0]``, ... or ``tensors['fc.weight']``, ...
        tensors: in order.
    """

    def __init__(self, op: str, tensors: Any) -> None:
        self.op = op
        self.form: Any = None
        if isinstance(tensors, Tensor):
            self.names, self.tensors = ["tensor"], [tensors]
            return
        if isinstance(tensors, Mapping):
            self.form, self.tensors = list(tensors), list(tensors.values())
            keys = self.form
        elif isinstance(tensors, Sequence) and not isinstance(tensors, (str, bytes)):
            self.form, self.tensors = list, list(tensors)
            keys = range(len(self.tensors))
        else:
            raise TypeError(
                f"{op}: tensors must be a tensor, or a list or mapping of tensors, got "
                f"{type(tensors).__name__}"
            )
        self.names = [f"tensors[{key!r}]" for key in keys]

    def is_spread(self, value: Any) -> bool:
        """Whether an argument names one value for each tensor."""
        return isinstance(value, (Mapping, Sequence)) and not isinstance(value, (str, bytes))

    def each(self, name: str, value: Any) -> list[Any]:
        """One value of the argument ``name`` for each tensor."""
        if not self.is_spread(value):
            return [value] * len(self.tensors)
        if isinstance(value, Mapping):
            if not isinstance(self.form, list):
                raise TypeError(f"{self.op}: {name} may be a mapping only where tensors are one")
            if set(value) != set(self.form):
                raise ValueError(
                    f"{self.op}: {name} must have the keys of tensors, {self.form}, got "
                    f"{list(value)}"
                )
            return [value[key] for key in self.form]
        if self.form is not list or len(value) != len(self.tensors):
            raise ValueError(
                f"{self.op}: {name} as a list must go with a list of as many tensors, got "
                f"{len(value)} for {len(self.tensors)}"
            )
        return list(value)

    def labels(self, name: str, value: Any) -> list[str]:
        """What errors call the argument ``name`` of each tensor: alpha, or alpha[0], ..."""
        if not self.is_spread(value):
            return [name] * len(self.tensors)
        return [tensor.replace("tensors", name, 1) for tensor in self.names]

    def like(self, results: list[Any]) -> Any:
        """``results``, one a tensor, in the form that the tensors came in."""
        if self.form is None:
            return results[0]
        return results if self.form is list else dict(zip(self.form, results, strict=True))
