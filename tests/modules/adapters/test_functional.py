"""The fused function against the plain formula: values, gradients and tensors saved for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.adapters.functional import Rows, fused, plain
from modules.adapters.weight import FrozenWeight

D_IN, RANK, N = 20, 3, 13
LAYOUTS: dict[str, tuple[int, list[Rows]]] = {
    "whole": (12, [(0, 12)]),
    "two of three": (24, [(0, 8), (16, 24)]),
    "unequal": (20, [(1, 6), (7, 18)]),
    "unequal ranks": (20, [(1, 6), (7, 18)]),
}
TRAINED: list[tuple[str, ...]] = [("b",), ("a",), ("a", "b"), ("x",), ("x", "b"), ("x", "a"), ("x", "a", "b")]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Case:
    """Random operands of one layout. The factors of each slice are separate leaf tensors."""

    def __init__(
        self,
        layout: str,
        trained: tuple[str, ...],
        dtype: torch.dtype,
        factors: torch.dtype,
        bias: bool = True,
        drops: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        d_out, self.rows = LAYOUTS[layout]

        def draw(*shape: int, of: torch.dtype, name: str = "") -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(of).requires_grad_(name in trained)

        self.x = draw(N, D_IN, of=dtype, name="x")
        self.weight = draw(d_out, D_IN, of=dtype)
        self.bias = draw(d_out, of=dtype) if bias else None
        self.ranks = [RANK + 2 * i if layout == "unequal ranks" else RANK for i in range(len(self.rows))]
        self.a = [draw(rank, D_IN, of=factors, name="a") for rank in self.ranks]
        self.b = [
            draw(stop - start, rank, of=factors, name="b")
            for (start, stop), rank in zip(self.rows, self.ranks, strict=True)
        ]
        self.cotangent = draw(N, d_out, of=dtype)
        self.mask = (torch.rand(N, D_IN, generator=generator) < 0.6).to(dtype) / 0.6 if drops else None

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, *self.a, *self.b) if t.requires_grad]

    def dropped(self) -> Tensor | None:
        return None if self.mask is None else self.x * self.mask

    def fused(self) -> Tensor:
        return fused(*self.operands())

    def plain(self) -> Tensor:
        return plain(*self.operands())

    def operands(self) -> tuple[Any, ...]:
        weight = FrozenWeight(self.weight)
        return self.x, weight, self.bias, 0.7, self.rows, torch.cat(self.a), self.b, self.dropped()


def saved_tensors(run: Any) -> list[Tensor]:
    """Return the tensors that a forward pass saves for its backward pass."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return tensors


with_dropout = pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])


@with_dropout
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_equal_the_plain_formula(
    layout: str, trained: tuple[str, ...], dtype: torch.dtype, drops: bool
) -> None:
    factors = torch.promote_types(dtype, torch.float32)  # factors are float32 even beside a half-precision backbone
    case = Case(layout, trained, dtype, factors, drops=drops)
    ours, reference = case.fused(), case.plain()
    assert ours.dtype == dtype
    close = {"atol": 8 * TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(ours, reference, **close)
    gradients = torch.autograd.grad(ours, case.leaves(), case.cotangent)
    expected = torch.autograd.grad(reference, case.leaves(), case.cotangent)
    for leaf, actual, expected_gradient in zip(case.leaves(), gradients, expected, strict=True):
        assert actual.dtype == leaf.dtype
        torch.testing.assert_close(actual, expected_gradient, **close)


@with_dropout
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_pass_gradcheck(layout: str, trained: tuple[str, ...], bias: bool, drops: bool) -> None:
    case = Case(layout, trained, torch.float64, torch.float64, bias, drops)
    assert torch.autograd.gradcheck(lambda *_: case.fused(), case.leaves(), fast_mode=True)


@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_tensors_that_gradients_need_are_saved(layout: str, trained: tuple[str, ...]) -> None:
    case = Case(layout, trained, torch.float32, torch.float32)
    shapes = {tuple(t.shape) for t in saved_tensors(case.fused) if t.shape[0] == N}
    expected_shapes = {(N, sum(case.ranks))} if "b" in trained else set()
    assert shapes == expected_shapes | ({(N, D_IN)} if "a" in trained else set())
    weights = [t for t in saved_tensors(case.fused) if t.shape == case.weight.shape]
    assert len(weights) == ("x" in trained)  # only the gradient of x needs W
    assert all(t.data_ptr() == case.weight.data_ptr() for t in weights)
    if trained == ("b",):
        assert len(saved_tensors(case.fused)) == 1  # neither factor is saved if x needs no gradient


@with_dropout
def test_autocast_saves_no_second_copy_of_a_weight(drops: bool) -> None:
    case = Case("whole", ("x", "b"), torch.float32, torch.float32, drops=drops)
    with torch.autocast("cpu", torch.bfloat16):
        case.x = case.x.detach().bfloat16().requires_grad_()
        case.mask = case.mask.bfloat16() if case.mask is not None else None
        saved = saved_tensors(case.fused)
        out = case.fused()
    assert out.dtype == torch.bfloat16
    assert [t.data_ptr() for t in saved if t.shape == case.weight.shape] == [case.weight.data_ptr()]
    masks = {(N, D_IN)} if drops else set()
    assert {tuple(t.shape) for t in saved if t.dtype == torch.bfloat16} == {(N, RANK)} | masks


def test_backward_within_autocast_keeps_full_precision() -> None:
    case = Case("two of three", ("x", "a", "b"), torch.float32, torch.float32)
    expected = torch.autograd.grad(case.fused(), case.leaves(), case.cotangent)
    out = case.fused()
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(out, case.leaves(), case.cotangent)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trained", [("x", "b"), ("x", "a"), ("x", "a", "b")], ids="-".join)
def test_gradient_checkpointing_does_not_change_gradients(trained: tuple[str, ...], reentrant: bool) -> None:
    case = Case("two of three", trained, torch.float32, torch.float32)
    expected = torch.autograd.grad(case.fused(), case.leaves(), case.cotangent)
    out: Any = checkpoint(lambda _: case.fused(), case.x, use_reentrant=reentrant)
    out.backward(case.cotangent)
    assert all(torch.equal(leaf.grad, e) for leaf, e in zip(case.leaves(), expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", [("x", "b"), ("x", "a"), ("x", "a", "b")], ids="-".join)
def test_the_function_compiles_as_one_graph(trained: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    case = Case("two of three", trained, torch.float32, torch.float32)

    def run(x: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
        return fused(x, FrozenWeight(case.weight), case.bias, 0.7, case.rows, torch.cat(a), b)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")  # inductor would need a C++ compiler
    out = compiled(case.x, case.a, case.b)
    torch.testing.assert_close(out, case.fused())
    expected = torch.autograd.grad(case.fused(), case.leaves(), case.cotangent)
    for actual, wanted in zip(torch.autograd.grad(out, case.leaves(), case.cotangent), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_second_derivative_is_refused() -> None:
    case = Case("whole", ("x", "b"), torch.float64, torch.float64)
    (gradient,) = torch.autograd.grad(case.fused().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
