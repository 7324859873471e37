"""Tables of the GPU's steps that are kept from call to call: what makes a new one, and what not.

Making a table needs neither Triton nor a GPU. That steps by kept tables are right is tested in
Triton's interpreter (step_triton_cases.py) and on GPUs (tests/gpu).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ppkernels as pp
from ppkernels.ops.step import kept, table
from ppkernels.ops.step.table import COLUMNS, HEAD, HEAD_WORDS, Lists


def lists_of(*shape: int, weights: int = 3) -> Lists:
    """What a call of Adam is given, with masks, and with all numbers on the device."""
    mask = pp.BitMask.pack(torch.rand(shape) < 0.5).words

    def tensors() -> list[Tensor]:
        return [torch.rand(shape) for _ in range(weights)]

    return Lists(
        "adam_step_",
        tensors(),
        tensors(),
        {"exp_avgs": tensors(), "exp_avg_sqs": tensors()},
        [],
        [mask.clone() for _ in range(weights)],
        [torch.tensor(1.5, dtype=torch.float64) for _ in range(weights)],
        [0] * weights,
        [torch.zeros(()) for _ in range(weights)],
    )


def with_last(tensors: Any, last: Any) -> list[Any]:
    return [*tensors[:-1], last]


def replaced(name: str, make: Callable[[Tensor], Any]) -> Callable[[Lists], Lists]:
    """The last entry of a list, or of a list of states, is another one."""

    def change(lists: Lists) -> Lists:
        if name in lists.states:
            states = lists.states
            last = make(states[name][-1])
            return replace(lists, states={**states, name: with_last(states[name], last)})
        tensors = getattr(lists, name)
        return replace(lists, **{name: with_last(tensors, make(tensors[-1]))})

    return change


CHANGES = {
    **{
        f"other {name}": replaced(name, torch.clone)
        for name in ("weights", "grads", "exp_avgs", "exp_avg_sqs", "masks", "alphas", "steps")
    },
    "no mask": replaced("masks", lambda words: words[:0]),
    "no masks": lambda lists: replace(lists, masks=[]),
    "phi": replaced("holds_phi", lambda _: 1),
    "one weight less": lambda lists: replace(
        lists,
        **{
            name: getattr(lists, name)[:-1]
            for name in ("weights", "grads", "masks", "alphas", "holds_phi", "steps")
        },
        states={name: states[:-1] for name, states in lists.states.items()},
    ),
    "one state more": lambda lists: replace(
        lists, states={**lists.states, "max_exp_avg_sqs": lists.states["exp_avgs"]}
    ),
    "another op": lambda lists: replace(lists, op="sgd_step_"),
    # At the same addresses:
    "another layout": replaced("weights", lambda w: w.as_strided((6, 7), (1, 6))),
    "a gradient in another layout": replaced("grads", lambda g: g.as_strided((6, 7), (1, 6))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_table_is_kept_until_something_changes(name: str) -> None:
    lists = lists_of(6, 7)
    first = kept.table_for(lists)
    first.on_device({}, lists)
    # Other objects, the same memory.
    same = replace(lists, weights=[weight.view(6, 7) for weight in lists.weights])
    assert kept.table_for(same) is first
    changed = CHANGES[name](lists)
    expected = table.table_of(changed)
    came = kept.table_for(changed)
    assert came is not first
    assert came.groups == expected.groups
    for mine, fresh in zip(came.rows, expected.rows, strict=True):
        # Where something is copied, it is copied anew.
        copied = {"grad", "mask", "state0", "state1"} if expected.in_use else set()
        assert all(mine.words[k] == fresh.words[k] for k in set(COLUMNS) - copied)


def test_other_dtypes_at_the_same_addresses() -> None:
    memory = [torch.rand(8, dtype=torch.float64) for _ in range(2)]
    made = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weight, grad = (t.view(dtype)[:8] for t in memory)
        alpha = torch.tensor(1.5, dtype=torch.float64)
        lists = Lists("sgd_step_", [weight], [grad], {}, [], [], [alpha], [])
        made[dtype] = kept.table_for(lists)
        assert made[dtype].groups[0].weight_dtype is dtype
    assert len({id(each) for each in made.values()}) == 4


@pytest.mark.parametrize("name", ["alphas", "weights", "grads", "exp_avgs", "masks", "steps"])
def test_values_are_not_in_the_table(name: str) -> None:
    """They are read on the device, so that a new value needs no new table."""
    lists = lists_of(6, 7)
    first = kept.table_for(lists)
    for tensor in lists.states.get(name) or getattr(lists, name):
        tensor.add_(1)
    assert kept.table_for(lists) is first


def test_numbers_on_the_host_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponents on the host make a new table when they change; counts there are never kept."""
    lists = lists_of(6, 7)
    lists = replace(lists, op="sgd_step_", states={}, steps=[])

    def on_device(tensor: Tensor, device: torch.device) -> bool:
        return tensor.dtype != torch.float64 and tensor.dim() > 0

    monkeypatch.setattr(table, "lies_on", on_device)
    monkeypatch.setattr(kept, "lies_on", on_device)
    first = kept.table_for(lists)
    assert kept.table_for(lists) is first
    lists.alphas[0].fill_(2.0)
    second = kept.table_for(lists)
    assert second is not first
    assert {row.words["alpha"] for row in second.rows} == {table.bits(1.5), table.bits(2.0)}
    adam = lists_of(6, 7)
    assert kept.table_for(adam) is not kept.table_for(adam)


def test_only_what_changed_is_brought_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []
    tensor = torch.tensor

    def counted(words: Any, *args: Any, **more: Any) -> Tensor:
        brought.append(len(words))
        return tensor(words, *args, **more)

    lists = lists_of(6, 7)
    head = {"lr": table.bits(0.1), "eps": table.bits(1e-8)}
    rows = kept.table_for(lists)
    monkeypatch.setattr(torch, "tensor", counted)
    words = rows.on_device(head, lists)
    assert brought == [HEAD_WORDS + len(COLUMNS) * 3]
    columns = words[HEAD_WORDS:].clone()
    assert kept.table_for(lists).on_device(head, lists) is words
    assert len(brought) == 1
    head["lr"] = table.bits(0.2)
    assert kept.table_for(lists).on_device(head, lists) is words
    assert brought[1:] == [HEAD_WORDS]
    # A word that is not named is 0 again.
    del head["eps"]
    rows.on_device(head, lists)
    assert words[HEAD.index("lr")] == table.bits(0.2)
    assert words[HEAD.index("eps")] == 0
    assert torch.equal(words[HEAD_WORDS:], columns)


def test_a_table_made_in_inference_mode_serves_the_steps_after_it() -> None:
    lists = lists_of(6, 7)
    with torch.inference_mode():
        inside = kept.table_for(lists)
        words = inside.on_device({"lr": table.bits(0.1)}, lists)
    assert kept.table_for(lists) is inside
    assert inside.on_device({"lr": table.bits(0.2)}, lists) is words
    assert words[HEAD.index("lr")] == table.bits(0.2)


def test_tables_of_copies_are_not_kept() -> None:
    """The copies are as old as the table."""
    lists = lists_of(6, 7)
    gaps = torch.rand(6, 14)[:, ::2]
    for changed in (
        replace(lists, weights=with_last(lists.weights, gaps)),
        replace(lists, grads=with_last(lists.grads, gaps)),
        replace(lists, grads=with_last(lists.grads, torch.rand(7, 6).t())),
    ):
        assert kept.table_for(changed) is not kept.table_for(changed)


def test_old_tables_make_room() -> None:
    first = lists_of(2)
    table_of_first = kept.table_for(first)
    assert kept.table_for(first) is table_of_first
    others = [lists_of(2, weights=1) for _ in range(100)]
    for other in others:
        kept.table_for(other)
    assert kept.table_for(first) is not table_of_first
    assert kept.table_for(others[-1]) is kept.table_for(others[-1])


def test_nothing_of_the_model_is_kept_alive() -> None:
    lists = lists_of(6, 7)
    kept.table_for(lists).on_device({}, lists)
    gone = [weakref.ref(t) for t in (*lists.weights, *lists.grads, *lists.masks, *lists.alphas)]
    del lists
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)


@pytest.mark.parametrize("name", ["steps", "grad_scale", "found_inf"])
def test_a_capture_refuses_numbers_on_the_host(
    name: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays would all take the same one: Adam would not get beyond its first correction."""
    lists = lists_of(6, 7)
    scaling = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
    on_host = [*lists.steps] if name == "steps" else [scaling[name]]
    for module in ("_checks", "ops.step.kept", "ops.step.table"):
        monkeypatch.setattr(f"ppkernels.{module}.is_captured", lambda device: True)
    launch(lists, **scaling)
    assert len(launches) == 2
    monkeypatch.setattr(
        table, "lies_on", lambda tensor, device: all(tensor is not each for each in on_host)
    )
    with pytest.raises(RuntimeError, match=f"adam_step_: every replay .* value that {name}"):
        launch(lists, **scaling)
    assert len(launches) == 2
    assert all(step.item() == 0 for step in lists.steps)


@pytest.mark.parametrize("op", ["sgd_step_", "adam_step_"])
def test_inductor_records_no_step(op: str) -> None:
    """Its trial run of a CUDA graph refuses memory that is kept, such as a table's."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.ppkernels, op).default.tags


class NoValues(TorchDispatchMode):
    """An error where the value of a tensor is asked for, which a GPU would be waited for."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket
        asked = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)
        assert name not in asked, f"{name} asks for a value"
        return op(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the launches to come, which launch nothing."""
    pytest.importorskip("triton")
    from ppkernels.ops.step import gpu

    made: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: made.append(args)

    for kernel in ("prepare_kernel", "step_kernel"):
        monkeypatch.setattr(gpu, kernel, Recorder())
    return made


def launch(lists: Lists, lr_dtype: torch.dtype = torch.float32, **scaling: Tensor) -> None:
    """What the GPU's launcher of Adam does."""
    from ppkernels.ops.step import gpu

    arguments = [lists.weights, lists.grads, *lists.states.values(), [], lists.steps, []]
    arguments += [lists.masks, lists.alphas, lists.holds_phi, torch.tensor(0.1, dtype=lr_dtype)]
    words = (0.9, 0.999, 1e-8, 0.1, "decoupled", "theta", "virtual", False)
    gpu.adam_step_(*arguments, *words, *scaling.values())


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["as they are", "with gaps", "channels_last"])
def test_the_launcher_asks_for_no_value(
    layout: str, lr_dtype: torch.dtype, launches: list[Any]
) -> None:
    """Whatever has to be copied or put in another order, and however lr, scale and flag come."""
    lists = lists_of(4, 6, 3, 3)
    if layout == "with gaps":
        lists = replace(lists, weights=[torch.rand(4, 6, 3, 6)[..., ::2] for _ in range(3)])
    if layout == "channels_last":
        weights = [w.contiguous(memory_format=torch.channels_last) for w in lists.weights]
        lists = replace(lists, weights=weights)
    scaling = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
    with NoValues():
        for _ in range(2):
            launch(lists, lr_dtype, **scaling)
    assert len(launches) == 4
    with NoValues(), pytest.raises(AssertionError, match="asks for a value"):
        torch.ones(()).item()


def test_a_captured_call_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph copies it from the host at every replay, so it must be there as long as the weights.

    Exponents and masks too: a layer may exchange them, and the graph knows their addresses. The
    weights are their memory, whichever tensors of it the call was given.
    """
    lists = lists_of(6, 7)
    weights = lists.weights
    lists = replace(lists, weights=[weight.detach() for weight in weights])
    eager = kept.table_for(lists)
    for module in (kept, table):
        monkeypatch.setattr(module, "is_captured", lambda device: True)
    hosts: list[weakref.ref[Tensor]] = []
    tensor = torch.tensor

    def noted(*args: Any, **more: Any) -> Tensor:
        hosts.append(weakref.ref(made := tensor(*args, **more)))
        return made

    monkeypatch.setattr(torch, "tensor", noted)
    captured = kept.table_for(lists)
    assert captured is not eager
    captured.on_device({}, lists)
    monkeypatch.undo()
    assert kept.table_for(lists) is eager
    watched = [*hosts, *map(weakref.ref, (*lists.masks, *lists.alphas))]
    del lists, captured
    gc.collect()
    assert len(hosts) == 1
    assert None not in [each() for each in watched]
    del weights
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)
