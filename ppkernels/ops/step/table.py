"""A call of the fused step as one table of integers, which is all that its GPU kernels are told.

The table has a head of numbers that all weights share (`HEAD`) and a row for each weight, stored
column by column (`COLUMNS`). A number is the bits of a float64, so that none is rounded on its way;
a tensor is the address of its memory. Rows of the same dtypes stand together: a `Group`, which is
stepped by one launch. What the lists of a call hold is checked here.
"""

from __future__ import annotations

import math
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppkernels._checks import check_floating, check_not_captured, is_captured
from ppkernels.ops._layout import arranged_words, is_dense, same_layout

HEAD = (
    # Numbers; which of them mean something depends on the optimizer. `decoupled_rate` is λ for
    # decoupled decay and 0 for coupled, `decay_rate` the other way round; a `halvings` is −log₂β.
    *("lr", "decoupled_rate", "decay_rate", "grad_factor", "momentum", "undamped"),
    *("rest1", "beta2", "rest2", "eps", "beta1_halvings", "beta2_halvings"),
    # Addresses of one number, or 0; lr is then what stands there, as a float32 or as a float64.
    *("grad_scale", "found_inf", "lr_single", "lr_double"),
)
# The columns start at a cache line.
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
        memory: the table on the device, once it is there; ``head`` is what its head holds.
    """

    rows: list[Row] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    in_use: list[Tensor] = field(default_factory=list)
    written: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    memory: Tensor | None = None
    head: list[int] = field(default_factory=list)

    def on_device(self, head: dict[str, int], lists: Lists) -> Tensor:
        """The table on the device of ``lists``, which it was made of: int64 [HEAD_WORDS +
        len(COLUMNS)·rows]. What is there already is not brought again; nothing waits.
        """
        words = [head.get(name, 0) for name in HEAD]
        if self.memory is None:
            columns = [row.words[column] for column in COLUMNS for row in self.rows]
            # A step outside of inference mode may write its head to what one inside has made.
            with torch.inference_mode(False):
                host = _host_words(words + columns, lists)
                self.memory = host.to(lists.weights[0].device, non_blocking=True)
        elif words != self.head:
            self.memory[:HEAD_WORDS].copy_(_host_words(words, lists), non_blocking=True)
        self.head = words
        return self.memory

    def write_back(self) -> None:
        """Brings what was stepped in copies home, once the kernels are launched."""
        for home, copy in self.written:
            home.copy_(copy)


def _host_words(words: list[int], lists: Lists) -> Tensor:
    """``words`` where the device of ``lists`` can copy them from without a stop."""
    weight = lists.weights[0]
    is_gpu = weight.device.type != "cpu"
    # From memory that is not pinned, the copy would wait for the device.
    host = torch.tensor(words, dtype=torch.int64, device="cpu", pin_memory=is_gpu)
    if is_captured(weight.device):
        # A CUDA graph copies from the host's memory at every replay, and follows the table to
        # exponents and masks, which layers may exchange. It can be replayed while its weights'
        # memory lives; when it ends itself, nothing here can tell.
        kept = (host, lists.masks, lists.alphas)
        weakref.finalize(weight.untyped_storage(), _let_go, kept).atexit = False
    return host


def _let_go(kept: object) -> None:
    """The end of what `_host_words` kept: it was held by this call to come."""


def table_of(lists: Lists) -> Table:
    """The rows of a call, but for counts on the CPU (`count_steps`); the lists are checked."""
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
    """Counts Adam's steps on the CPU up, and fills their entries; the others are the kernel's."""
    if table.memory is not None:
        return  # made with all of them on the device
    for row in table.rows:
        step = lists.steps[row.place]
        if not lies_on(step, lists.weights[0].device):
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
        if arranged is not lists.masks[i]:
            table.in_use.append(arranged)
        words["mask"] = arranged.data_ptr()
    words["numel"] = weight.numel()
    words["flags"] = HOLDS_PHI if lists.holds_phi and lists.holds_phi[i] else 0
    _set_alpha(lists, lists.alphas[i], weight.device, words)
    if "exp_avgs" in lists.states:
        step = lists.steps[i]
        check_number(lists.op, "steps", step, weight.device)
        words["step"] = step.data_ptr() if lies_on(step, weight.device) else 0
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


def check_followed(
    lists: Lists, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """Numbers that change lie where the replays of a CUDA graph look, if one is recorded."""
    device = lists.weights[0].device
    if not is_captured(device):
        return
    scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    for name, numbers in {"steps": lists.steps, **{k: (v,) for k, v in scaling.items()}}.items():
        if not all(number is None or lies_on(number, device) for number in numbers):
            check_not_captured(lists.op, name, device)


def check_number(
    op: str, name: str, number: Tensor, device: torch.device, *or_as: torch.dtype
) -> None:
    """``number`` is one float32, or of a dtype in ``or_as``, on ``device`` or on the CPU."""
    dtypes = (torch.float32, *or_as)
    is_near = number.device in (device, torch.device("cpu"))
    if not is_near or number.dtype not in dtypes or number.numel() != 1:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise RuntimeError(
            f"{op}: {name} must hold one {kinds} number on {device} or on the CPU, "
            f"got {_described(number)}"
        )
