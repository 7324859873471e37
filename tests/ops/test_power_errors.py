"""Bad calls of the ops of `power`: each error says what was wanted and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ppkernels as pp

W = torch.randn(2, 3)
WANTED_ALPHA = "alpha must be a finite number >= 1"
WANTED_TENSOR = "alpha as a tensor must be 0-dim float64 (a rounded exponent is another exponent)"
WANTED_DTYPE = "must be float32, float64, bfloat16 or float16"

# The ops of one exponent, as functions of a weight and the exponent.
ONE_EXPONENT: dict[str, Callable[[Tensor, object], Tensor]] = {
    "power": lambda weight, alpha: pp.power(weight, alpha),
    "power_backward": lambda weight, alpha: pp.power_backward(weight, weight, alpha),
    "power_double_backward": lambda weight, alpha: pp.power_double_backward(
        weight, weight, weight, alpha
    ),
    "inverse_power": lambda weight, alpha: pp.inverse_power(weight, alpha),
}
each_op = pytest.mark.parametrize("op", ONE_EXPONENT)


def float64(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def raises(error: type[Exception], *parts: str) -> pytest.RaisesContext[Exception]:
    """`pytest.raises` for a message that begins with the first part and holds the others."""
    pattern = "^" + ".*".join(re.escape(part) for part in parts)
    return pytest.raises(error, match=f"(?s){pattern}")


# ---- the exponent


@pytest.mark.parametrize(
    ("alpha", "error", "parts"),
    [
        (0.5, ValueError, (WANTED_ALPHA, "got 0.5")),
        (0, ValueError, (WANTED_ALPHA, "got 0")),
        (-2.0, ValueError, (WANTED_ALPHA, "got -2.0")),
        (math.nan, ValueError, (WANTED_ALPHA, "got nan")),
        (math.inf, ValueError, (WANTED_ALPHA, "got inf")),
        (True, TypeError, ("alpha must be a float or a 0-dim float64 tensor, got bool",)),
        ("2", TypeError, ("alpha must be a float or a 0-dim float64 tensor, got str",)),
        (None, TypeError, ("alpha must be a float or a 0-dim float64 tensor, got NoneType",)),
        (torch.tensor(2), TypeError, (WANTED_TENSOR, "got () torch.int64")),
        (torch.tensor(1.5), TypeError, (WANTED_TENSOR, "got () torch.float32")),
        (float64([1.5]), TypeError, (WANTED_TENSOR, "got (1,) torch.float64")),
        (
            float64(1.5).requires_grad_(),
            ValueError,
            ("there is no gradient with respect to alpha; pass alpha.detach()",),
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
@each_op
def test_exponent(op: str, alpha: object, error: type[Exception], parts: tuple[str, ...]) -> None:
    with raises(error, f"{op}: ", *parts):
        ONE_EXPONENT[op](W, alpha)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf], ids=str)
@each_op
def test_value_of_an_exponent_tensor(op: str, value: float, backend: str) -> None:
    with pp.backend(backend), pytest.raises((ValueError, RuntimeError)) as caught:
        ONE_EXPONENT[op](W, float64(value))
    message = str(caught.value).lower()
    assert f"{op}: {WANTED_ALPHA}, got {value}" in message


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_value_of_an_exponent_tensor_with_out(backend: str) -> None:
    out = torch.zeros(2, 3)
    with pp.backend(backend), pytest.raises((ValueError, RuntimeError), match=WANTED_ALPHA):
        pp.power(W, float64(0.5), out=out)
    assert (out == 0).all()


@pytest.mark.parametrize("name", ["alpha_from", "alpha_to"])
def test_exponents_of_rebase(name: str) -> None:
    good = {"alpha_from": 1.5, "alpha_to": 2.0}
    with raises(ValueError, f"rebase: {name} must be a finite number >= 1, got 0.5"):
        pp.rebase(W, **{**good, name: 0.5})
    with raises(TypeError, f"rebase: {name} must be a float or a 0-dim float64 tensor, got bool"):
        pp.rebase(W, **{**good, name: False})
    with raises(ValueError, f"rebase: there is no gradient with respect to {name}"):
        pp.rebase(W, **{**good, name: float64(1.5).requires_grad_()})


# ---- the weight


@pytest.mark.parametrize(
    ("weight", "parts"),
    [
        (torch.ones(3, dtype=torch.int64), (WANTED_DTYPE, "got int64")),
        (torch.ones(3, dtype=torch.bool), (WANTED_DTYPE, "got bool")),
        (torch.ones(3, dtype=torch.complex64), (WANTED_DTYPE, "got complex64")),
        (torch.ones(3, dtype=torch.float8_e4m3fn), (WANTED_DTYPE, "got float8_e4m3fn")),
        (torch.eye(3).to_sparse(), ("must be a dense tensor, got layout torch.sparse_coo",)),
        ([1.0, 2.0], ("must be a torch.Tensor, got list",)),
        (1.5, ("must be a torch.Tensor, got float",)),
    ],
    ids=["int64", "bool", "complex64", "float8", "sparse", "list", "float"],
)
@pytest.mark.parametrize("op", [*ONE_EXPONENT, "rebase"])
def test_weight(op: str, weight: object, parts: tuple[str, ...]) -> None:
    call = ONE_EXPONENT.get(op, lambda value, alpha: pp.rebase(value, alpha, 2.0))
    name = "theta" if op == "inverse_power" else "weight"
    with raises(TypeError, f"{op}: {name} {parts[0]}", *parts[1:]):
        call(weight, 1.5)


@pytest.mark.parametrize(
    ("other", "error", "parts"),
    [
        (torch.ones(3, 2), ValueError, ("must have the shape of weight, (2, 3), got (3, 2)",)),
        (torch.ones(3), ValueError, ("must have the shape of weight, (2, 3), got (3,)",)),
        (
            torch.ones(2, 3, dtype=torch.bfloat16),
            TypeError,
            ("must have the dtype of weight, torch.float32, got torch.bfloat16",),
        ),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, (WANTED_DTYPE, "got int32")),
        (
            torch.ones(2, 3, device="meta"),
            ValueError,
            ("must be on the device of weight, cpu, got meta",),
        ),
        (None, TypeError, ("must be a torch.Tensor, got NoneType",)),
    ],
    ids=["shape", "broadcast", "dtype", "int32", "device", "none"],
)
@pytest.mark.parametrize("name", ["grad_theta", "grad_grad_weight", "out", "out of backward"])
def test_tensors_that_must_be_like_the_weight(
    name: str, other: Tensor, error: type[Exception], parts: tuple[str, ...]
) -> None:
    if name.startswith("out") and other is None:
        return  # the default of out=
    op, call = {
        "grad_theta": ("power_backward", lambda: pp.power_backward(other, W, 1.5)),
        "out": ("power", lambda: pp.power(W, 1.5, out=other)),
        "out of backward": ("power_backward", lambda: pp.power_backward(W, W, 1.5, out=other)),
        "grad_grad_weight": (
            "power_double_backward",
            lambda: pp.power_double_backward(other, W, W, 1.5),
        ),
    }[name]
    with raises(error, f"{op}: {name.split()[0]} {parts[0]}", *parts[1:]):
        call()


# ---- the mask

WORDS = pp.pack_bits(torch.ones(2, 3, dtype=torch.bool))
MASKED_CALLS: dict[str, Callable[[object], Tensor]] = {
    "power": lambda words: pp.power(W, 1.5, words=words),
    "power_backward": lambda words: pp.power_backward(W, W, 1.5, words=words),
    "power_double_backward": lambda words: pp.power_double_backward(W, W, W, 1.5, words=words),
}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), TypeError, "words must be a uint8 tensor, got bool"),
        (pp.BitMask.ones((2, 3)), TypeError, "words must be a uint8 tensor, got BitMask"),
        (WORDS.view(1, 1), ValueError, "words must be a contiguous 1-dim tensor, got shape (1, 1)"),
        (
            torch.zeros(2, dtype=torch.uint8),
            ValueError,
            "words must have one bit for each of 6 entries, that is 1 bytes, got 2",
        ),
        (WORDS.to("meta"), ValueError, "words must be on the device of weight, cpu, got meta"),
    ],
    ids=["bool", "mask", "2-dim", "size", "device"],
)
@pytest.mark.parametrize("op", MASKED_CALLS)
def test_words(op: str, words: object, error: type[Exception], message: str) -> None:
    with raises(error, f"{op}: {message}"):
        MASKED_CALLS[op](words)


@pytest.mark.skipif(pp.cpu_capability() == "reference", reason="what the compiled kernels check")
@pytest.mark.parametrize("words", [WORDS.repeat(2), WORDS.bool()], ids=["size", "dtype"])
@pytest.mark.parametrize("op", MASKED_CALLS)
def test_the_raw_ops_refuse_words_that_they_would_misread(op: str, words: Tensor) -> None:
    inputs = {"power": 1, "power_backward": 2, "power_double_backward": 3}[op]
    out = torch.zeros_like(W)
    with raises(RuntimeError, f"{op}: words must be a contiguous uint8 CPU tensor of 1 bytes"):
        getattr(torch.ops.ppkernels, op)(*[W] * inputs, float64(1.5), words)
    if op != "power_double_backward":
        with raises(RuntimeError, f"{op}: words must be a contiguous uint8 CPU tensor of 1 bytes"):
            getattr(torch.ops.ppkernels, f"{op}_out")(*[W] * inputs, float64(1.5), out, words)
        assert (out == 0).all()


# ---- out=


OUT_CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "power": lambda weight, out: pp.power(weight, 1.5, out=out),
    "power_backward": lambda weight, out: pp.power_backward(
        torch.ones_like(weight), weight, 1.5, out=out
    ),
}


@pytest.mark.parametrize("op", OUT_CALLS)
def test_out_with_several_elements_in_one_place(op: str) -> None:
    out = torch.zeros(1, 3).expand(2, 3)
    with raises(ValueError, f"{op}: out has several elements in one place (shape (2, 3), strides"):
        OUT_CALLS[op](W, out)


@pytest.mark.parametrize("op", OUT_CALLS)
def test_out_and_gradients(op: str) -> None:
    message = f"{op}: out= has no gradient; call it under torch.no_grad(), or leave out= away"
    with raises(RuntimeError, message):
        OUT_CALLS[op](W.clone().requires_grad_(), torch.empty(2, 3))
    with raises(RuntimeError, message):
        OUT_CALLS[op](W, torch.empty(2, 3, requires_grad=True))
    with torch.no_grad():
        result = OUT_CALLS[op](W.clone().requires_grad_(), torch.empty(2, 3))
    assert not result.isnan().any()


def test_a_changed_out_is_noticed_by_autograd() -> None:
    saved = torch.rand(3)
    loss = (saved * torch.rand(3, requires_grad=True)).sum()
    pp.power(torch.rand(3), 1.5, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- gradients that do not exist


def test_inverse_power_and_rebase_have_no_gradient() -> None:
    weight = torch.rand(3, requires_grad=True)
    with raises(RuntimeError, "inverse_power: this op has no gradient; call it under"):
        pp.inverse_power(weight, 1.5)
    with raises(RuntimeError, "rebase: this op has no gradient; call it under"):
        pp.rebase(weight, 1.5, 2.0)
    assert not pp.inverse_power(weight.detach(), 1.5).requires_grad


def test_the_third_derivative_is_an_error() -> None:
    weight = torch.rand(3, requires_grad=True)
    (first,) = torch.autograd.grad(pp.power(weight, 2.5).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight, create_graph=True)
    # The second term has a gradient: without an error the first would be left out in silence.
    with pytest.raises(RuntimeError, match="the third derivative is not implemented"):
        (second.sum() + weight.sum()).backward()


WITHOUT_GRADIENT = {
    "inverse_power": lambda weight: pp.inverse_power(weight, 2.0),
    "rebase": lambda weight: pp.rebase(weight, 2.0, 3.0),
    "power_double_backward": lambda weight: pp.power_double_backward(weight, weight, weight, 2.5),
    "power(out=)": lambda weight: pp.power(weight, 2.0, out=torch.empty_like(weight)),
}


# PyTorch's own first use of forward mode scripts functions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("op", WITHOUT_GRADIENT)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_a_tangent_is_not_dropped_in_silence(op: str, backend: str) -> None:
    weight = torch.rand(3)
    with pp.backend(backend), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, weight)
        with pytest.raises(RuntimeError, match="no gradient"):
            WITHOUT_GRADIENT[op](dual)
    with pp.backend(backend), pytest.raises(RuntimeError, match="no gradient"):
        torch.func.jvp(WITHOUT_GRADIENT[op], (weight,), (weight,))


def test_exponent_on_a_third_device() -> None:
    alpha = torch.tensor(1.5, dtype=torch.float64, device="meta")
    with raises(
        ValueError, "power: alpha must be on the CPU or on the device of the weight, cpu", "meta"
    ):
        pp.power(torch.ones(3), alpha)


def test_an_exponent_just_below_one_is_shown_as_such() -> None:
    alpha = torch.tensor(1 - 1e-10, dtype=torch.float64)
    with raises(ValueError, "power: alpha", "got 0.99999999"):
        pp.power(torch.ones(3), alpha)
    if pp.cpu_capability() != "reference":
        with raises(RuntimeError, "power: alpha", "got 0.99999999"):
            torch.ops.ppkernels.power(torch.ones(3), alpha)


def test_out_that_is_a_negated_view() -> None:
    out = torch.zeros(3, dtype=torch.complex64).conj().imag
    with raises(ValueError, "power: out", "pass out.resolve_neg()"):
        pp.power(torch.ones(3), 2.0, out=out)


def test_backends_of_threads_that_overlap() -> None:
    first, second = pp.backend("reference"), pp.backend("reference")
    with first:
        second.__enter__()
    weight = torch.rand(5)
    assert torch.equal(pp.power(weight, 1.3), pp.reference.power(weight, as_alpha(1.3)))
    second.__exit__(None, None, None)
    with pp.backend("kernels"):
        pass
    with pp.backend("reference"):
        expected = pp.power(weight, 1.3)
    # Back on what the process started with.
    assert torch.allclose(pp.power(weight, 1.3), expected)


def as_alpha(alpha: float) -> torch.Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


# ---- the switch


def test_backend_of_another_name() -> None:
    with raises(ValueError, "backend: 'nonsense' is not one of kernels, reference"):  # noqa: SIM117
        with pp.backend("nonsense"):
            pass


def test_backend_is_restored_after_an_error() -> None:
    weight = torch.rand(100) * 1e-3
    before = pp.power(weight, 3.7)
    with pytest.raises(KeyError), pp.backend("reference"):
        raise KeyError
    assert torch.equal(pp.power(weight, 3.7), before)
