"""A call of the fused step as one table of integers, which is all that its GPU kernels are told.

The table has a head of numbers that all weights share (`HEAD`) and a row for each weight, stored
column by column (`COLUMNS`). A number is the bits of a float64, so that none is rounded on its way;
a tensor is the address of its memory. Rows of the same dtypes stand together: a `Group`, which is
stepped by one launch. What the lists of a call hold is checked here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppkernels._checks import check_floating
from ppkernels.ops._layout import arranged_words, is_dense, same_layout

HEAD = (
    # Numbers; which of them mean something depends on the optimizer. `kept` is 1 − ηλ for decoupled
    # decay and 1 for coupled; `decay_rate` is λ for coupled decay and 0 for decoupled; a `halvings`
    # is −log₂β.
    *("lr", "kept", "decay_rate", "grad_factor", "momentum", "undamped"),
    *("rest1", "beta2", "rest2", "eps", "beta1_halvings", "beta2_halvings"),
    # Addresses of one float32, or 0.
    *("grad_scale", "found_inf"),
)
# So many words, of which the last are not used, that the columns start at a cache line.
HEAD_WORDS = 16

COLUMNS = (
    # Addresses; 0 for a mask that is not there.
    *("weight", "grad", "master", "state0", "state1", "state2", "mask"),
    # Numbers or addresses, as `flags` says: α, and Adam's count of steps, as a number counted up.
    *("alpha", "step"),
    # Integers. A kernel's program takes one block of elements of one weight; `first_block` counts
    # the blocks of the group's weights before.
    *("numel", "first_block", "flags"),
)
HOLDS_PHI, ALPHA_IS_NUMBER, STEP_IS_NUMBER = 1, 2, 4

# Elements of a block: for each of 128 threads, as many as 128-bit accesses of half types take.
# Chosen for bytes in flight, not tuned on hardware.
BLOCK = 1024


def block_of(dtype: torch.dtype) -> int:
    """Elements of a block of weights of ``dtype``."""
    return BLOCK // 2 if dtype is torch.float64 else BLOCK


def bits(number: float) -> int:
    """The bits of a float64, as an int64."""
    return int(struct.unpack("=q", struct.pack("=d", number))[0])


def lies_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a kernel on ``device`` reads the tensor itself; else its number is read here."""
    return tensor.device == device


@dataclass(frozen=True)
class Lists:
    """The lists of a call, as the schemas in op.py have them; ``states`` one per state of Adam."""

    op: str
    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: dict[str, Sequence[Tensor]]
    masters: Sequence[Tensor]
    masks: Sequence[Tensor]
    alphas: Sequence[Tensor]
    holds_phi: Sequence[int]
    steps: Sequence[Tensor] = ()

    def check_lengths(self) -> None:
        required = {"grads": self.grads, "alphas": self.alphas, **self.states}
        if "exp_avgs" in self.states:
            required["steps"] = self.steps
        optional = {"masters": self.masters, "masks": self.masks, "holds_phi": self.holds_phi}
        for name, entries in (*required.items(), *optional.items()):
            if len(entries) != len(self.weights) and (name in required or len(entries) != 0):
                raise RuntimeError(
                    f"{self.op}: {name} must have an entry for each of the {len(self.weights)} "
                    f"weights, got {len(entries)}"
                )


@dataclass(frozen=True)
class Group:
    """Rows ``begin`` to ``begin + rows − 1``: weights that one launch can step."""

    weight_dtype: torch.dtype
    state_dtype: torch.dtype
    is_aligned: bool
    has_masters: bool
    begin: int
    rows: int
    blocks: int
    has_masks: bool


@dataclass
class Row:
    """A weight's entries in `COLUMNS`, its place in the lists, and what a group has in common."""

    key: tuple[torch.dtype, torch.dtype, bool, bool]
    place: int
    words: dict[str, int]


@dataclass
class Table:
    """Rows in the order of their groups.

    Attributes:
        rows: one a weight.
        groups: all of them, in order.
        in_use: copies that have to live until the kernels are launched.
        written: tensors with gaps, each with the copy that is stepped in its place.
    """

    rows: list[Row] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    in_use: list[Tensor] = field(default_factory=list)
    written: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def on_device(self, head: dict[str, int], device: torch.device) -> Tensor:
        """The table, int64 [HEAD_WORDS + len(COLUMNS)·rows]; nothing waits for the device."""
        words = [head.get(name, 0) for name in HEAD]
        words += [0] * (HEAD_WORDS - len(HEAD))
        for column in COLUMNS:
            words += [row.words[column] for row in self.rows]
        # From memory that is not pinned, the copy would wait for the device.
        host = torch.tensor(words, dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")
        return host.to(device, non_blocking=True)

    def write_back(self) -> None:
        """Brings what was stepped in copies home, once the kernels are launched."""
        for home, copy in self.written:
            home.copy_(copy)


def table_of(lists: Lists) -> Table:
    """The rows of a call, but for Adam's counts (`count_steps`); the lists are checked."""
    lists.check_lengths()
    table = Table()
    for i in range(len(lists.weights)):
        table.rows.append(_row(lists, i, table))
    order = sorted(range(len(table.rows)), key=lambda i: str(table.rows[i].key))
    table.rows = [table.rows[i] for i in order]
    keys = [row.key for row in table.rows]
    for key in dict.fromkeys(keys):
        table.groups.append(_group(table, keys.index(key), keys.count(key)))
    return table


def count_steps(lists: Lists, table: Table) -> None:
    """Fills the column ``step``. Counts on the CPU go up here, the others in the kernel."""
    for row in table.rows:
        step = lists.steps[row.place]
        if lies_on(step, lists.weights[0].device):
            row.words["step"] = step.data_ptr()
        else:
            step += 1
            row.words["step"] = bits(step.item())
            row.words["flags"] |= STEP_IS_NUMBER


def _group(table: Table, begin: int, rows: int) -> Group:
    members = table.rows[begin : begin + rows]
    blocks = 0
    for row in members:
        row.words["first_block"] = blocks
        blocks += -(-row.words["numel"] // block_of(members[0].key[0]))
    has_masks = any(row.words["mask"] for row in members)
    return Group(*members[0].key, begin, rows, blocks, has_masks)


def _row(lists: Lists, i: int, table: Table) -> Row:
    weight = lists.weights[i]
    check_floating(lists.op, "weights", weight)
    _check_like(lists, "grads", lists.grads[i], weight, (weight.dtype,))
    layout = weight if is_dense(weight) else weight.contiguous()
    if layout is not weight:
        table.written.append((weight, layout))

    def memory_of(tensor: Tensor, written: bool = True) -> int:
        if same_layout(tensor, layout):
            return tensor.data_ptr()
        copy = torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)
        table.in_use.append(copy)
        if written:
            table.written.append((tensor, copy))
        return copy.data_ptr()

    words = dict.fromkeys(COLUMNS, 0)
    words["weight"] = layout.data_ptr()
    words["grad"] = memory_of(lists.grads[i], written=False)
    states = [states[i] for states in lists.states.values()]
    state_dtype = _check_states(lists, i, states)
    for k, state in enumerate(states):
        words[f"state{k}"] = memory_of(state)
    if lists.masters and lists.masters[i].numel() != 0:
        _check_master(lists, lists.masters[i], weight, state_dtype if states else None)
        state_dtype = torch.float32
        words["master"] = memory_of(lists.masters[i])
    if lists.masks and lists.masks[i].numel() != 0:
        arranged = arranged_words(lists.op, lists.masks[i], layout)
        table.in_use.append(arranged)
        words["mask"] = arranged.data_ptr()
    words["numel"] = weight.numel()
    words["flags"] = HOLDS_PHI if lists.holds_phi and lists.holds_phi[i] else 0
    _set_alpha(lists, lists.alphas[i], weight.device, words)
    if "exp_avgs" in lists.states:
        check_number(lists.op, "steps", lists.steps[i], weight.device)
    addresses = [words[name] for name in ("weight", "grad", "master", "state0", "state1", "state2")]
    is_aligned = all(address % 16 == 0 for address in addresses)
    return Row((weight.dtype, state_dtype, is_aligned, words["master"] != 0), i, words)


def _set_alpha(lists: Lists, alpha: Tensor, device: torch.device, words: dict[str, int]) -> None:
    has_form = alpha.dtype == torch.float64 and alpha.dim() == 0
    if not has_form or alpha.device not in (device, torch.device("cpu")):
        raise RuntimeError(
            f"{lists.op}: alphas must be 0-dim float64 tensors on {device} or on the CPU, got "
            f"{_described(alpha)}"
        )
    if lies_on(alpha, device):
        words["alpha"] = alpha.data_ptr()
        return
    value = alpha.item()
    if not (value >= 1 and math.isfinite(value)):
        raise RuntimeError(f"{lists.op}: alphas must be finite numbers >= 1, got {value}")
    words["alpha"] = bits(value)
    words["flags"] |= ALPHA_IS_NUMBER


# ---- checks


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_like(
    lists: Lists, name: str, tensor: Tensor, weight: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    same = tensor.shape == weight.shape and tensor.device == weight.device
    if not same or tensor.dtype not in dtypes or tensor.layout is not torch.strided:
        wide = ", or float32 where that is a half type" if len(dtypes) > 1 else ""
        raise RuntimeError(
            f"{lists.op}: {name} must be like its weight, {_described(weight)}{wide}; "
            f"got {_described(tensor)}"
        )


def _check_states(lists: Lists, i: int, states: Sequence[Tensor]) -> torch.dtype:
    """The dtype that the states share, which is the weight's where there is none."""
    weight = lists.weights[i]
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    dtypes = (weight.dtype, torch.float32) if is_half else (weight.dtype,)
    for name, state in zip(lists.states, states, strict=True):
        _check_like(lists, name, state, weight, dtypes)
        if state.dtype != states[0].dtype:
            raise RuntimeError(
                f"{lists.op}: the states of a weight must have one dtype, got "
                f"{_described(states[0])} and {_described(state)}"
            )
    return states[0].dtype if states else weight.dtype


def _check_master(
    lists: Lists, master: Tensor, weight: Tensor, state_dtype: torch.dtype | None
) -> None:
    _check_like(lists, "masters", master, weight, (weight.dtype, torch.float32))
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    has_wide_states = state_dtype in (None, torch.float32)
    if not is_half or master.dtype != torch.float32 or not has_wide_states:
        raise RuntimeError(
            f"{lists.op}: a master copy is float32 beside a half weight, with float32 states"
        )


def check_number(op: str, name: str, number: Tensor, device: torch.device) -> None:
    """``number`` is one float32 on ``device`` or on the CPU."""
    is_near = number.device in (device, torch.device("cpu"))
    if not is_near or number.dtype != torch.float32 or number.numel() != 1:
        raise RuntimeError(
            f"{op}: {name} must hold one float32 number on {device} or on the CPU, "
            f"got {_described(number)}"
        )
