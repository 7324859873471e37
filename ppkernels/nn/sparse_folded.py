"""What the sparse layers for inference share: values and indices as buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppkernels.nn.checkpoint import taken_topology
from ppkernels.ops import Topology


class FoldedSparse(nn.Module):
    """A sparse layer for inference: no Parameters, no masks, no exponent. `pp.fold` makes them.

    Attributes:
        weight: the kept values θ, [E], a buffer.
        offsets, columns: the indices of `pp.Topology`, buffers. Do not write to them.
        bias: a buffer, or None.
        shape: of the dense layer's weight.

    ``.to(torch.bfloat16)`` takes half the bytes for the values; indices stay as they are.
    torch.compile(fullgraph=True) and torch.export take such layers. A gradient flows through them
    to their input; as each pass then sorts the indices anew, inference belongs under
    ``torch.no_grad()``.

    Checkpoints: the state_dict holds ``weight``, ``bias``, ``offsets`` and ``columns``. Loading
    checks the indices, as in `Sparse`, and may change the number of entries. The checkpoint of a
    `SparseLinear` without masks is taken too; one of a powered layer is not: fold that one first.
    """

    weight: Tensor
    offsets: Tensor
    columns: Tensor
    bias: Tensor | None
    shape: torch.Size

    def hold(self, topology: Topology, weight: Tensor, bias: Tensor | None) -> None:
        """Take these as the layer's buffers; the tensors of ``topology`` are copied.

        Raises:
            TypeError, ValueError: values that are not those of the topology's entries, or a bias
                of another shape.
        """
        name = type(self).__name__
        if not weight.is_meta:
            topology.check_values(name, weight)
        if bias is not None and bias.shape != (topology.rows,):
            raise ValueError(
                f"{name}: bias must have shape ({topology.rows},), got {tuple(bias.shape)}"
            )
        self.shape = topology.shape
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("offsets", topology.offsets.clone())
        self.register_buffer("columns", topology.columns.clone())

    @property
    def topology(self) -> Topology:
        """Where the values stand in the weight of the dense layer."""
        return Topology.unchecked(self.offsets, self.columns, self.shape)

    def dense(self) -> Tensor:
        """θ as the dense layer's weight: 0 where nothing is kept."""
        return self.topology.scatter(self.weight)

    def _described(self) -> str:
        return f", kept={self.columns.numel()}/{self.shape.numel()}, dtype={self.weight.dtype}"

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_buffers": self._buffers.copy()}
        if self.columns.dtype == torch.uint16:
            # pickle cannot load a tensor that is uint16 (torch.load can).
            state["_buffers"]["columns"] = self.columns.view(torch.int16)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.columns.dtype == torch.int16:
            self._buffers["columns"] = self.columns.view(torch.uint16)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.topology
        try:
            topology = taken_topology(state_dict, prefix, own)
        except (TypeError, ValueError) as error:
            error_msgs.append(f'"{prefix}weight": {error}')
            return
        if topology is not None:
            if topology is not own:
                self.hold(topology, self.weight.new_empty(topology.count()), self.bias)
            state_dict[prefix + "offsets"] = topology.offsets
            state_dict[prefix + "columns"] = topology.columns
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
