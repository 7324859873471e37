"""Which entries of a sparse weight are kept: `Topology`, and the ops on its indices."""

from ppkernels.ops.topology.op import (
    change_topology,
    gather_kept,
    mask_of_topology,
    scatter_kept,
    topology_fault,
    topology_of_mask,
    transpose_topology,
)
from ppkernels.ops.topology.topology import Topology, Transposed

__all__ = [
    "Topology",
    "Transposed",
    "change_topology",
    "gather_kept",
    "mask_of_topology",
    "scatter_kept",
    "topology_fault",
    "topology_of_mask",
    "transpose_topology",
]
