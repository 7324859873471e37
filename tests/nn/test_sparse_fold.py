"""`pp.fold` of sparse layers: for inference, without Parameters, compiled and exported."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp

FORMS = [None, "theta", "phi"]


def folded(
    sparse_pair: Callable[..., tuple], stores: str | None
) -> tuple[nn.Module, Tensor, Tensor]:
    """A folded model of one layer, an input, and its output before."""
    _, layer, x = sparse_pair(stores)
    layer.mask = pp.BitMask.ones(layer.weight.shape)
    model = nn.Sequential(layer).eval()
    out = model(x).detach()
    assert pp.fold(model) is model
    assert model[0] is layer
    return model, x, out


@pytest.mark.parametrize("stores", FORMS)
def test_outputs_stay_bit_for_bit(sparse_pair: Callable[..., tuple], stores: str | None) -> None:
    model, x, out = folded(sparse_pair, stores)
    layer = model[0]
    is_linear = isinstance(layer, pp.nn.FoldedSparseLinear)
    assert is_linear or type(layer) is pp.nn.FoldedSparseConv2d
    assert isinstance(layer, pp.nn.FoldedSparse)
    assert torch.equal(model(x), out)
    assert list(model.parameters()) == []
    names = [name for name, _ in layer.named_buffers()]
    assert names == [name for name in ("weight", "bias", "offsets", "columns") if name in names]
    assert not layer.training
    assert layer.dense().shape == layer.shape == layer.topology.shape
    assert torch.equal(layer.dense().flatten()[layer.topology.places()], layer.weight)
    assert f"kept={layer.topology.count()}/{layer.shape.numel()}, dtype=torch.float32" in repr(
        layer
    )
    # As another library would see it: a plain module.
    assert not isinstance(layer, pp.nn.Masked)
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()


@pytest.mark.parametrize("stores", FORMS)
def test_compile_and_export(sparse_pair: Callable[..., tuple], stores: str | None) -> None:
    model, x, out = folded(sparse_pair, stores)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), out)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert {"0.weight", "0.offsets", "0.columns"} <= set(program.graph_signature.buffers)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x), out)
    more = torch.cat([x, x])
    torch.testing.assert_close(loaded(more), torch.cat([out, out]))


def test_gradients_flow_through(sparse_pair: Callable[..., tuple]) -> None:
    dense, sparse, x = sparse_pair(None)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(dense(x).square().sum(), x)
    (came,) = torch.autograd.grad(pp.fold(sparse)(x).square().sum(), x)
    torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-5)


def test_half_the_bytes() -> None:
    layer = pp.fold(pp.nn.SparseLinear(64, 32, kept=0.1))
    x = torch.randn(3, 64)
    out = layer(x)
    layer.to(torch.bfloat16)
    assert [buffer.dtype for buffer in layer.buffers()] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.int32,
        torch.uint16,
    ]
    torch.testing.assert_close(layer(x.bfloat16()).float(), out, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kept", [0.1, 0.3])
def test_checkpoints(kept: float, assign: bool) -> None:
    saved = pp.nn.SparseLinear(16, 12, kept=0.3)
    x = torch.randn(5, 16)
    trained, out = saved.state_dict(), saved(x).detach()
    end = pp.fold(saved).state_dict()
    assert list(end) == ["weight", "bias", "offsets", "columns"]
    for state in (trained, end):
        with torch.device("meta" if assign else "cpu"):
            layer = pp.fold(pp.nn.SparseLinear(16, 12, kept=kept))
        topology, before = layer.topology, layer.weight
        state = {f"0.{name}": value for name, value in state.items()}
        nn.Sequential(layer).load_state_dict(state, assign=assign)
        assert torch.equal(layer(x), out)
        wrong = {**state, "0.columns": state["0.columns"].int().flip(0).to(torch.uint16)}
        with pytest.raises(RuntimeError, match=r'"0\.weight": .*columns must ascend'):
            nn.Sequential(layer).load_state_dict(wrong)
        assert torch.equal(layer(x), out)
        assert topology.count() == before.numel()
    # A topology that other layers have is not written to.
    shared = pp.Topology.of_mask(pp.BitMask.pack(torch.rand(12, 16) < 0.3))
    words = shared.mask()
    layer = pp.fold(pp.nn.SparseLinear(16, 12, kept=shared))
    layer.load_state_dict(end)
    assert shared.mask() == words


def test_a_powered_checkpoint_is_refused() -> None:
    layer = pp.fold(pp.nn.SparseLinear(16, 12, kept=0.3))
    powered = pp.nn.PowerSparseLinear(16, 12, kept=0.3, alpha=2.0, stores="phi")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"alpha", "stores_phi"'):
        layer.load_state_dict(powered.state_dict())


@pytest.mark.parametrize("stores", FORMS)
def test_zeros_are_not_kept(sparse_pair: Callable[..., tuple], stores: str | None) -> None:
    _, layer, x = sparse_pair(stores)
    is_seen = torch.rand(layer.weight.shape) < 0.5
    with torch.no_grad():
        layer.weight[:2] = 0
        layer.weight[2] = float("nan")
    is_seen[:3] = True
    layer.mask = pp.BitMask.pack(is_seen)
    is_seen[:2] = False
    theta, out = layer.dense(), layer(x)
    plain = pp.fold(layer)
    assert plain.topology.count() == plain.weight.numel() == is_seen.sum()
    assert torch.equal(plain.dense().nan_to_num(7), theta.nan_to_num(7))
    torch.testing.assert_close(plain(x), out, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_tied_layers_fold() -> None:
    first = pp.nn.PowerSparseLinear(16, 12, kept=0.3, alpha=2.0, stores="phi")
    second = pp.nn.PowerSparseLinear(16, 12, kept=first.topology, alpha=2.0, stores="phi")
    second.weight = first.weight
    x = torch.randn(5, 16)
    out = [first(x), second(x)]
    first, second = pp.fold(nn.ModuleList([first, second]))
    assert torch.equal(first(x), out[0])
    assert torch.equal(second(x), out[1])
    assert first.weight.data_ptr() == second.weight.data_ptr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: pp.nn.FoldedSparseLinear(t, torch.randn(3)),
            r"values must have shape \(4,\)",
        ),
        (
            lambda t: pp.nn.FoldedSparseLinear(t, torch.randn(4), torch.randn(3)),
            r"bias must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda t: pp.nn.FoldedSparseConv2d(t, torch.randn(4)),
            r"topology must have shape \[N, C, H, W\], got \(2, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(pp.Topology.of(torch.ones(2, 2)))


def test_a_subclass_is_refused() -> None:
    class Own(pp.nn.SparseLinear):
        pass

    with pytest.raises(TypeError, match="is a subclass of a masked layer"):
        pp.fold(Own(4, 3, kept=0.5))
