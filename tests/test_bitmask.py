"""`pp.BitMask`: the algebra of masks, copies, devices, files, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppkernels as pp
from ppkernels import BitMask

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=200, database=None)

SHAPES = ((), (0,), (1,), (8,), (37,), (3, 5), (2, 3, 4, 5), (3, 0, 2))


@st.composite
def mask_tensors(draw: st.DrawFn, count: int) -> list[Tensor]:
    """``count`` bool tensors of one shape, from none to all entries set."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shares = draw(st.lists(st.sampled_from([0, 0.1, 0.5, 1]), min_size=count, max_size=count))
    return [torch.rand(shape, generator=generator) < share for share in shares]


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.4


# ---- algebra


@quick
@given(mask_tensors(3))
def test_set_algebra_is_that_of_bool_tensors(tensors: list[Tensor]) -> None:
    x, y, _ = tensors
    a, b, c = map(BitMask.pack, tensors)
    assert torch.equal((a & b).unpack(), x & y)
    assert torch.equal((a | b).unpack(), x | y)
    assert torch.equal((a - b).unpack(), x & ~y)
    assert torch.equal((~a).unpack(), ~x)
    assert (a == b) is torch.equal(x, y)
    assert (a != b) is not torch.equal(x, y)
    assert a.count() == x.sum()
    assert a.numel() == x.numel()
    assert ~(a & b) == ~a | ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert a - b == a & ~b
    assert a.count() + b.count() == (a & b).count() + (a | b).count()
    assert a.count() + (~a).count() == a.numel()


@quick
@given(mask_tensors(1))
def test_bits_behind_the_last_entry_stay_0(tensors: list[Tensor]) -> None:
    (x,) = tensors
    a = BitMask.pack(x)
    dirty = torch.full_like(a.words, 255)
    for mask in (a, ~a, ~~a, a | ~a, BitMask.ones(x.shape), BitMask(dirty, x.shape)):
        bits = pp.unpack_bits(mask.words, 8 * mask.words.numel())
        assert not bits[x.numel() :].any()
    assert ~~a == a
    assert BitMask(dirty, x.shape) == BitMask.ones(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_unpack(shape: tuple[int, ...]) -> None:
    tensor = random_mask(*shape)
    mask = BitMask.pack(tensor)
    assert mask.shape == torch.Size(shape)
    assert isinstance(mask.shape, torch.Size)
    assert mask.numel() == math.prod(shape)
    assert mask.device == torch.device("cpu")
    assert (mask.words.dtype, mask.words.shape) == (torch.uint8, ((mask.numel() + 7) // 8,))
    assert torch.equal(mask.unpack(), tensor)
    assert BitMask(mask.words, shape) == mask
    assert type(mask.count()) is int
    assert BitMask.zeros(shape).count() == 0
    assert BitMask.ones(shape).count() == math.prod(shape)


def test_a_number_as_shape() -> None:
    assert BitMask.ones(5).shape == (5,)
    assert BitMask(torch.ones(1, dtype=torch.uint8), 5) == BitMask.pack(torch.arange(5) == 0)


def test_numbers_of_numpy_in_a_shape() -> None:
    mask = BitMask.ones((np.int64(3), np.uint8(5)))
    assert mask == BitMask.ones((3, 5))
    assert all(type(size) is int for size in mask.shape)
    assert BitMask(mask.words, [np.int32(15)]).shape == (15,)
    assert pp.unpack_bits(mask.words, np.int64(15)).all()
    with pytest.raises(TypeError, match="shape must be a number or a tuple of numbers"):
        BitMask.ones((np.float64(3), 5))
    with pytest.raises(TypeError, match="shape must be a number or a tuple of numbers"):
        BitMask.ones((np.bool_(True), 5))


def test_strides_do_not_matter() -> None:
    tensor = random_mask(4, 6, 3, 3)
    channels_last = tensor.contiguous(memory_format=torch.channels_last)
    assert BitMask.pack(channels_last) == BitMask.pack(tensor)
    assert BitMask.pack(tensor.permute(1, 0, 2, 3)) != BitMask.pack(tensor)


def test_equality() -> None:
    mask = BitMask.ones((2, 4))
    assert mask != BitMask.ones((4, 2))
    assert mask != BitMask.ones(8)
    assert mask != "mask"
    assert (mask == None) is False  # noqa: E711 - the comparison itself is tested
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((300, 784), "BitMask(300x784, 0 of 235200 kept)"),
        ((7,), "BitMask(7, 0 of 7 kept)"),
        ((), "BitMask(0-dim, 0 of 1 kept)"),
    ],
)
def test_repr(shape: tuple[int, ...], text: str) -> None:
    assert repr(BitMask.zeros(shape)) == text
    assert repr(BitMask.zeros(shape, device="meta")) == text.split(", ")[0] + ", meta)"


# ---- immutable, copies, devices, files


def test_a_mask_cannot_be_changed() -> None:
    words = torch.zeros(2, dtype=torch.uint8)
    mask = BitMask(words, 9)
    words.fill_(1)
    assert mask.count() == 0
    with pytest.raises(AttributeError, match="masks are immutable, so 'words' cannot be set"):
        mask.words = words
    with pytest.raises(AttributeError, match="masks are immutable, so 'note' cannot be set"):
        mask.note = "a"
    with pytest.raises(AttributeError, match="masks are immutable, so 'shape' cannot be deleted"):
        del mask.shape
    before = mask
    mask |= BitMask.ones(9)
    assert (before.count(), mask.count()) == (0, 9)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies(duplicate: object) -> None:
    mask = BitMask.pack(random_mask(5, 7))
    twin = duplicate(mask)
    assert type(twin) is BitMask
    assert twin == mask
    assert twin.shape == mask.shape
    assert twin.words.data_ptr() != mask.words.data_ptr()


def test_devices() -> None:
    mask = BitMask.pack(random_mask(5, 7))
    assert mask.to("cpu") is mask
    assert mask.cpu() is mask
    on_meta = mask.to("meta")
    assert on_meta.device == torch.device("meta")
    assert on_meta.shape == mask.shape
    with torch.device("meta"):
        assert BitMask.zeros(9).device == torch.device("meta")
        assert BitMask.ones(9, device="cpu").count() == 9


@pytest.mark.gpu
@pytest.mark.gpu
def test_to_the_gpu_and_back() -> None:
    mask = BitMask.pack(random_mask(5, 7))
    there = mask.cuda()
    assert there.device.type == "cuda"
    assert there == mask
    assert (there & ~there).count() == 0
    assert there.cpu() == mask
    assert torch.equal(there.unpack().cpu(), mask.unpack())


def test_masks_go_through_files() -> None:
    mask, file = BitMask.pack(random_mask(5, 7)), io.BytesIO()
    torch.save({"masks": [mask]}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["masks"] == [mask]


def test_words_go_through_files() -> None:
    save = pytest.importorskip("safetensors.torch").save
    load = pytest.importorskip("safetensors.torch").load
    mask = BitMask.pack(random_mask(5, 7))
    file = io.BytesIO()
    torch.save({"mask": mask.words}, file)
    file.seek(0)
    assert BitMask(torch.load(file, weights_only=True)["mask"], (5, 7)) == mask
    assert BitMask(load(save({"mask": mask.words}))["mask"], (5, 7)) == mask


# ---- errors

WORDS = torch.zeros(2, dtype=torch.uint8)
ERRORS = [
    (
        lambda: BitMask(torch.zeros(2, dtype=torch.bool), 9),
        TypeError,
        "BitMask: words must be the uint8 words of a mask, got a bool tensor; BitMask.pack(mask)",
    ),
    (
        lambda: BitMask(torch.zeros(2), 9),
        TypeError,
        "BitMask: words must be a uint8 tensor, got float32",
    ),
    (lambda: BitMask([0, 0], 9), TypeError, "BitMask: words must be a uint8 tensor, got list"),
    (
        lambda: BitMask(WORDS, (3, 6)),
        ValueError,
        "BitMask: words must have one bit for each of 18 entries, that is 3 bytes, got 2",
    ),
    (
        lambda: BitMask(WORDS.view(2, 1), 9),
        ValueError,
        "BitMask: words must be a contiguous 1-dim tensor, got shape (2, 1)",
    ),
    (lambda: BitMask(WORDS, "9"), TypeError, "BitMask: shape must be a number or a tuple of"),
    (lambda: BitMask(WORDS, torch.ones(2)), TypeError, "BitMask: shape must be a number or a"),
    (lambda: BitMask.zeros((-1, 2)), ValueError, "BitMask: shape must have no negative sizes"),
    (lambda: BitMask.pack(WORDS), TypeError, "pack_bits: mask must be a bool tensor, got uint8"),
    (
        lambda: BitMask.zeros(9) & BitMask.zeros((3, 3)),
        ValueError,
        "BitMask: the masks of a & b must have the same shape, got (9,) and (3, 3)",
    ),
    (
        lambda: BitMask.zeros(9) - BitMask.zeros(9, device="meta"),
        ValueError,
        "BitMask: the masks of a - b must be on the same device, got cpu and meta; move one of",
    ),
    (lambda: BitMask.zeros(9) | torch.zeros(9).bool(), TypeError, "unsupported operand type"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
