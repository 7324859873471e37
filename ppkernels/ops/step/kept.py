"""Tables that stay on the device from call to call, while nothing that is in them changes.

Making one takes some ten microseconds a weight on the host, finding out that it is still right a
fifth of that. What is compared is everything that a row is made of: addresses, dtypes, shapes,
strides and devices of all tensors, and the numbers that lie on the host. The head of a table is
compared by itself (`Table.on_device`), for a scheduler changes it in every step.

Not kept are tables of copies (weights with gaps, gradients that lie otherwise), tables with counts
of steps from the host, and those that a CUDA graph records, for a graph has to find its table at
every replay: that one is part of the graph.

Where memory comes from a pool of somebody's (`torch.cuda.use_mem_pool`), a table that is kept stays
in it, a few KB. Inductor's trial runs of CUDA graphs would not have that: they are kept from steps
by the ops' tags (op.py).
"""

from __future__ import annotations

import threading
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ppkernels._checks import is_captured
from ppkernels.ops.step.table import Lists, Table, lies_on, table_of

# More than any program has parameter groups, on all its devices and streams; a table is a few KB.
_MOST = 64

# From what `_place` says of a call to what its table was made of, and the table; oldest first.
_kept: dict[Any, tuple[Any, Table]] = {}
_lock = threading.Lock()


def table_for(lists: Lists) -> Table:
    """The table of a call, but for Adam's counts on the host: the last one if it is right still."""
    device = lists.weights[0].device
    made_of = None if is_captured(device) else _made_of(lists, device)
    if made_of is None:
        return table_of(lists)
    place = _place(lists, device)
    with _lock:
        known = _kept.pop(place, None)
    table = known[1] if known is not None and known[0] == made_of else table_of(lists)
    if not table.in_use and not table.written:
        with _lock:
            _kept[place] = (made_of, table)
            while len(_kept) > _MOST:
                del _kept[next(iter(_kept))]
    return table


def _place(lists: Lists, device: torch.device) -> Any:
    """What tells calls apart that come by turns.

    The stream is a part of it: memory that was made on one stream is free for it once it is let go,
    whatever others still read.
    """
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    weights = lists.weights
    return lists.op, device, stream, weights[0].data_ptr(), weights[-1].data_ptr(), len(weights)


def _made_of(lists: Lists, device: torch.device) -> Any:
    """All that the rows are made of, to be compared; None where it cannot be said or kept."""
    columns = (lists.weights, lists.grads, *lists.states.values(), lists.masters, lists.masks)
    columns = (*columns, lists.alphas, lists.steps)
    tensors = [tensor for column in columns for tensor in column]
    is_strided = all(tensor.layout is torch.strided for tensor in tensors)
    if not is_strided or not all(lies_on(step, device) for step in lists.steps):
        return None
    numbers = [alpha.item() for alpha in lists.alphas if not lies_on(alpha, device)]
    return (
        [*lists.states, *map(len, columns)],
        list(lists.holds_phi),
        numbers,
        *(list(map(read, tensors)) for read in _FORM),
    )


_FORM: tuple[Any, ...] = (
    Tensor.data_ptr,
    attrgetter("dtype"),
    attrgetter("shape"),
    Tensor.stride,
    attrgetter("device"),
)
