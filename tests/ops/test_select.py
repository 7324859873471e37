"""`topk_mask`: forms, ties, special values, layouts, threads, the rules on shares, errors."""
# Longer than 350 lines: one table of cases for each of the many forms that a call may take.

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import ppkernels as pp
from ppkernels import BitMask
from ppkernels.testing import DTYPES, LAYOUTS, random_bits, special_values
from ppkernels.testing_selection import LARGE, Selection, check_selection, exact_masks, weights

BACKENDS = ("kernels", "reference")
NAN, INF = torch.nan, torch.inf

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def kept(mask: BitMask) -> list[int]:
    """The indices of the entries that are set."""
    return mask.unpack().flatten().nonzero().flatten().tolist()


def drawn(*shape: int, kind: str = "drawn", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return weights(dtype, int(np.prod(shape)), kind, generator).view(shape)


# ---- forms


@each_backend
def test_the_masks_come_as_the_tensors_did(backend: str) -> None:
    a, b = torch.tensor([1.0, -4.0, 2.0]), torch.tensor([[3.0, -5.0]])
    with pp.backend(backend):
        one = pp.topk_mask(a, 2)
        assert isinstance(one, BitMask)
        assert (one.shape, kept(one)) == ((3,), [1, 2])
        first, second = pp.topk_mask([a, b], 3)
        assert (kept(first), kept(second)) == ([1], [0, 1])
        assert second.shape == (1, 2)
        named = pp.topk_mask({"a": a, "b": b}, 3)
        assert named == {"a": first, "b": second}
        assert list(named) == ["a", "b"]
        assert pp.topk_mask((a, b), 3) == [first, second]
        each = pp.topk_mask([a, b], [1, 0])
        assert list(map(kept, each)) == [[1], []]
        assert pp.topk_mask({"a": a, "b": b}, {"b": 0, "a": 1}) == dict(
            zip("ab", each, strict=True)
        )
        assert pp.topk_mask([], 0) == []
        assert pp.topk_mask({}, share=0.5) == {}


@each_backend
def test_exponents_as_numbers_tensors_lists_and_mappings(backend: str) -> None:
    a, b = torch.tensor([0.5, 0.3]), torch.tensor([0.5, 0.6])
    square = torch.tensor(2.0, dtype=torch.float64)
    with pp.backend(backend):
        # 0.5², 0.3² and 0.5, 0.6.
        expected = [[], [0, 1]]
        for alphas in ([2.0, None], [square, 1.0], (2, 1)):
            assert list(map(kept, pp.topk_mask([a, b], 2, alphas))) == expected
        named = pp.topk_mask({"a": a, "b": b}, 2, {"b": None, "a": 2.0})
        assert list(map(kept, named.values())) == expected
        # One for all changes nothing, and a tensor of its own has no other to differ from.
        assert list(map(kept, pp.topk_mask([a, b], 2, 2.0))) == [[0], [1]]
        assert list(map(kept, pp.topk_mask([a, b], [1, 1], [2.0, 1.0]))) == [[0], [1]]


@each_backend
def test_parameters_and_gradients(backend: str) -> None:
    layer = nn.Linear(7, 5)
    theta = layer.weight * 2
    with pp.backend(backend):
        masks = pp.topk_mask(dict(layer.named_parameters()), share=0.5)
        assert sum(mask.count() for mask in masks.values()) == 20
        mask = pp.topk_mask(theta, 3)
    assert not mask.words.requires_grad
    theta.sum().backward()
    assert layer.weight.grad is not None


# ---- how many


@each_backend
@pytest.mark.parametrize(
    ("share", "entries", "count"),
    [
        (0.29, 100, 29),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (0.1, 10, 1),
        (0.7, 10, 7),
        (0.57, 100, 57),
        (0.999, 1000, 999),
        (0.299, 10, 2),
        (0, 10, 0),
        (1, 10, 10),
        (0.5, 0, 0),
        (1, 0, 0),
    ],
)
def test_shares_mean_what_a_person_expects(
    share: float, entries: int, count: int, backend: str
) -> None:
    tensor = drawn(entries)
    with pp.backend(backend):
        assert pp.topk_mask(tensor, share=share).count() == count
        masks = pp.topk_mask([tensor, tensor], share=[share, 0])
        assert [mask.count() for mask in masks] == [count, 0]


@each_backend
@pytest.mark.parametrize("kind", ["drawn", "zeros", "grid"])
def test_exactly_k(kind: str, backend: str) -> None:
    tensors = [drawn(size, kind=kind) for size in (300, 0, 41, 5_000)]
    with pp.backend(backend):
        for k in (0, 1, 2, 533, 2_670, 5_340, 5_341):
            masks = pp.topk_mask(tensors, k)
            assert sum(mask.count() for mask in masks) == k
        counts = [300, 0, 0, 17]
        assert [mask.count() for mask in pp.topk_mask(tensors, counts)] == counts


def test_exactly_k_of_many() -> None:
    # More than one part for each of two threads, and ties everywhere.
    for kind in ("drawn", "zeros", "grid"):
        tensors = [drawn(size, kind=kind) for size in (200_003, 70_001, 9)]
        total = sum(map(len, tensors))
        for k in (1, total // 10, total // 9, total // 2, total - 1):
            assert sum(mask.count() for mask in pp.topk_mask(tensors, k)) == k


# ---- which ones


@each_backend
@each_dtype
def test_ties_go_to_the_lower_index(dtype: torch.dtype, backend: str) -> None:
    a = torch.tensor([1.0, -1.0, 2.0, 1.0], dtype=dtype)
    b = torch.tensor([[-1.0, 0.0], [-2.0, 1.0]], dtype=dtype)
    expected = {
        0: ([], []),
        1: ([2], []),
        2: ([2], [2]),
        3: ([0, 2], [2]),
        5: ([0, 1, 2, 3], [2]),
        6: ([0, 1, 2, 3], [0, 2]),
        7: ([0, 1, 2, 3], [0, 2, 3]),
        8: ([0, 1, 2, 3], [0, 1, 2, 3]),
    }
    with pp.backend(backend):
        for k, indices in expected.items():
            assert tuple(map(kept, pp.topk_mask([a, b], k))) == indices, k
            # In row-major order, wherever the elements lie.
            assert tuple(map(kept, pp.topk_mask([a, b.t().contiguous().t()], k))) == indices, k


@each_backend
@each_dtype
def test_special_values(dtype: torch.dtype, backend: str) -> None:
    values = [value for value in special_values(dtype) if value == value]
    # All bits of an infinity and of zeros count, so that ties are among them too.
    tensor = torch.tensor(values * 3, dtype=torch.float64).to(dtype)
    any_bits = random_bits(500, dtype, torch.Generator().manual_seed(0))
    any_bits = torch.where(any_bits.isnan(), 0.0, any_bits)
    with pp.backend(backend):
        for k in (0, 1, 5, 6, 7, 17, 18, 30, 53, 54):
            check_selection(Selection(f"k={k}", [tensor], k, [1.5]))
            check_selection(Selection(f"k={k}", [tensor, tensor], k, [1.5, 1.0]))
            check_selection(Selection(f"k={k}", [any_bits, tensor], k, [1.0, 1.0]))


def test_dtypes_are_compared_by_value() -> None:
    # The nearest of each dtype to 0.3, which are four numbers.
    tensors = [torch.tensor([0.3], dtype=dtype) for dtype in DTYPES]
    order = sorted(range(4), key=lambda i: -tensors[i].double().item())
    assert len({tensor.double().item() for tensor in tensors}) == 4
    for k in range(5):
        masks = pp.topk_mask(tensors, k)
        assert [i for i in range(4) if masks[i].count()] == sorted(order[:k])


# ---- layouts, masks, threads


@each_backend
@each_layout
def test_strides_do_not_matter(layout: object, backend: str) -> None:
    for kind in ("drawn", "grid"):
        tensor = layout.arrange(drawn(*layout.shape, kind=kind))
        count = tensor.numel() // 3
        with pp.backend(backend):
            mask = pp.topk_mask(tensor, count)
            assert mask == pp.topk_mask(tensor.contiguous(), count)
            check_selection(Selection(layout.name, [tensor, tensor], count, [1.0, 1.0]))


@each_dtype
def test_large_tensors_in_other_orders(dtype: torch.dtype) -> None:
    # More than a part, so that parts begin in the middle of rows.
    tensor = drawn(301, 77, 9, dtype=dtype)
    for turned in (tensor.permute(2, 0, 1), tensor.transpose(0, 1), tensor[:, ::2], tensor[:, 5:]):
        mask = pp.topk_mask(turned, share=0.1)
        assert mask == pp.topk_mask(turned.contiguous(), share=0.1)


@each_backend
@each_dtype
def test_within(dtype: torch.dtype, backend: str) -> None:
    tensor = drawn(5_000, dtype=dtype)
    hidden = torch.arange(5_000) % 3 == 0
    tensor[hidden] = NAN
    within = BitMask.pack(~hidden)
    with pp.backend(backend):
        for k in (0, 1, 500, 3_000, 3_333):
            mask = pp.topk_mask(tensor, k, within=within)
            assert mask == pp.topk_mask(tensor.nan_to_num(0.0), k)
        # Shares are of all entries.
        assert pp.topk_mask(tensor, share=0.1, within=within).count() == 500
        nines = torch.full((1_000,), 9.0)
        masks = pp.topk_mask([tensor, nines], 3_000, within=[within, None])
        assert masks == [pp.topk_mask(tensor, 2_000, within=within), BitMask.ones(1_000)]
        none = BitMask.zeros(5_000)
        assert pp.topk_mask(tensor, 0, within=none).count() == 0
        named = pp.topk_mask({"a": tensor}, 9, within={"a": within})
        assert named == {"a": pp.topk_mask(tensor, 9, within=within)}


def test_few_within_many() -> None:
    # A sample of the tensor holds few of the entries that may be kept, or none.
    tensor = drawn(LARGE)
    for step in (50, 10_007, LARGE):
        within = BitMask.pack(torch.arange(LARGE) % step == 0)
        few = tensor[::step]
        for k in {0, 1, len(few) // 2, len(few)}:
            mask = pp.topk_mask(tensor, k, within=within)
            assert torch.equal(mask.unpack()[::step], pp.topk_mask(few, k).unpack())
            assert mask.count() == k


@pytest.mark.parametrize("alphas", [[1.0] * 3, [1.0, 1.5, 2.0]], ids=["one", "several"])
@pytest.mark.parametrize("kind", ["drawn", "zeros", "grid"])
def test_same_masks_for_any_number_of_threads(kind: str, alphas: list[float]) -> None:
    sizes = zip((LARGE, 99, 80_000), DTYPES, strict=False)
    tensors = [drawn(size, kind=kind, dtype=dtype) for size, dtype in sizes]
    for k in (1_000, LARGE // 9, [5_000, 9, 80]):
        two = pp.topk_mask(tensors, k, alphas)
        torch.set_num_threads(1)
        one = pp.topk_mask(tensors, k, alphas)
        torch.set_num_threads(3)
        three = pp.topk_mask(tensors, k, alphas)
        torch.set_num_threads(2)
        assert one == two == three


def test_large_selections_are_those_of_a_sort() -> None:
    for kind in ("drawn", "zeros", "grid"):
        tensors = [drawn(size, kind=kind) for size in (LARGE, 70_001)]
        for k in (LARGE // 20, LARGE // 2):
            check_selection(Selection(kind, tensors, k, [1.0, 1.0]))


def test_hundreds_of_small_tensors() -> None:
    tensors = list(drawn(300 * 64).view(300, 64))
    for k in (1_920, [6] * 300):
        check_selection(Selection("small", tensors, k, [1.0] * 300))
    check_selection(Selection("small", tensors, 900, [1.0 + i / 300 for i in range(300)]))


# ---- the raw op, torch.compile


@pytest.mark.parametrize("counts", [[9], [4, 0]])
@pytest.mark.parametrize("is_masked", [False, True])
def test_opcheck(counts: list[int], is_masked: bool) -> None:
    tensors = [drawn(37), drawn(5, 8).t()]
    words = [torch.zeros(5, dtype=torch.uint8) for _ in tensors]
    within = [pp.pack_bits(torch.rand(37) < 0.9), torch.empty(0, dtype=torch.uint8)]
    args = (words, tensors, counts, [1.0, 1.5], within if is_masked else [])
    torch.library.opcheck(torch.ops.ppkernels.topk_bits_.default, args)


def test_the_bits_behind_the_last_entry_are_0() -> None:
    for n in (1, 7, 37, 65, 1_003):
        words = torch.full(((n + 7) // 8,), 255, dtype=torch.uint8)
        torch.ops.ppkernels.topk_bits_([words], [drawn(n)], [n], [1.0], [])
        assert torch.equal(words, BitMask.ones(n).words)


def test_inside_torch_compile() -> None:
    # A NaN is asked for, so the graph breaks there.
    def pruned(weight: Tensor) -> Tensor:
        theta = weight * 2
        return pp.apply_mask(theta, pp.topk_mask(theta, 9).words)

    torch._dynamo.reset()
    weight = drawn(100)
    compiled = torch.compile(pruned, backend="aot_eager")
    assert torch.equal(compiled(weight), pruned(weight))
    assert exact_masks(Selection("", [weight], 9, [1.0]))[0].count() == 9
