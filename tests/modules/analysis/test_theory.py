"""Closed forms of one-sided adapters in linear regression, and moments of networks."""

import math

import pytest
import torch
from torch import Tensor

from modules.analysis.theory import (
    Moments,
    expected_share,
    generalisation_bound,
    identity_root,
    removed_shares,
    root_of,
    share_over_b,
    simulate,
    theory_of,
)

D_OUT, D_IN, RANK, NOISE = 6, 9, 3, 0.3


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Δ, Σ, an orthonormal A and an orthonormal B."""
    sigma = torch.diag(1.0 / torch.arange(1, D_IN + 1, dtype=torch.float64))
    turn = torch.linalg.qr(draw(D_IN, D_IN, seed=1)).Q
    a = torch.linalg.qr(draw(D_IN, RANK, seed=2)).Q.T
    b = torch.linalg.qr(draw(D_OUT, RANK, seed=3)).Q
    return draw(D_OUT, D_IN), turn @ sigma @ turn.T, a, b


def regression_loss(update: Tensor, delta: Tensor, sigma: Tensor, noise: float = 0.0) -> Tensor:
    """Return the loss of an update ΔW: d_out·σ² + Tr[(ΔW − Δ)·Σ·(ΔW − Δ)ᵀ]."""
    residual = update - delta
    return D_OUT * noise + torch.trace(residual @ sigma @ residual.T)


def optimal_b(delta: Tensor, sigma: Tensor, a: Tensor) -> Tensor:
    """Return the best B over a frozen A: B* = ΔΣAᵀ(AΣAᵀ)⁻¹."""
    return delta @ sigma @ a.T @ torch.linalg.inv(a @ sigma @ a.T)


def optimal_a(delta: Tensor, b: Tensor) -> Tensor:
    """Return the best A over a frozen, orthonormal B, for any Σ: A* = BᵀΔ."""
    return b.T @ delta


def loss_over_a(delta: Tensor, sigma: Tensor, a: Tensor, noise: float = 0.0) -> Tensor:
    """Return the least loss over a frozen A: d_out·σ² + Tr[ΔΣΔᵀ] − Tr[AΣΔᵀΔΣAᵀ(AΣAᵀ)⁻¹]."""
    cross = delta @ sigma @ a.T  # (d_out, r)
    removed = torch.trace(cross.T @ cross @ torch.linalg.inv(a @ sigma @ a.T))
    return D_OUT * noise + torch.trace(delta @ sigma @ delta.T) - removed


def loss_over_b(delta: Tensor, sigma: Tensor, b: Tensor, noise: float = 0.0) -> Tensor:
    """Return the least loss over a frozen B: d_out·σ² + Tr[ΔΣΔᵀ] − Tr[BᵀΔΣΔᵀB]."""
    target_moment = delta @ sigma @ delta.T  # (d_out, d_out)
    return D_OUT * noise + torch.trace(target_moment) - torch.trace(b.T @ target_moment @ b)


def descend(delta: Tensor, sigma: Tensor, a: Tensor, b: Tensor, trained: str) -> tuple[Tensor, float]:
    """Run gradient descent on one factor. Return the update and its loss."""
    factors = {"A": a.clone(), "B": b.clone()}
    factor = factors[trained].zero_().requires_grad_()
    curvature = a @ sigma @ a.T if trained == "B" else sigma
    step_size = 0.5 / float(torch.linalg.eigvalsh(curvature)[-1])
    for _ in range(4000):
        loss = regression_loss(factors["B"] @ factors["A"], delta, sigma, NOISE)
        (gradient,) = torch.autograd.grad(loss, factor)
        with torch.no_grad():
            factor -= step_size * gradient
    update = (factors["B"] @ factors["A"]).detach()
    return update, float(regression_loss(update, delta, sigma, NOISE))


@pytest.mark.parametrize("trained", ["A", "B"])
def test_gradient_descent_converges_to_the_closed_form(trained: str) -> None:
    delta, sigma, a, b = problem()
    update, loss = descend(delta, sigma, a, b, trained)
    if trained == "B":
        expected, least = optimal_b(delta, sigma, a) @ a, loss_over_a(delta, sigma, a, NOISE)
    else:
        expected, least = b @ optimal_a(delta, b), loss_over_b(delta, sigma, b, NOISE)
    assert (update - expected).abs().max() <= 1e-6
    assert abs(loss - float(least)) <= 1e-6
    assert abs(float(regression_loss(expected, delta, sigma, NOISE) - least)) <= 1e-12


def test_solutions_equal_those_of_least_squares_on_samples() -> None:
    delta, _, a, b = problem()
    x = draw(50, D_IN, seed=4)
    y = x @ delta.T  # (n, d_out)
    sigma = x.T @ x / len(x)
    fitted_b = torch.linalg.lstsq(x @ a.T, y).solution.T
    # least squares over vec(A) for x Aᵀ Bᵀ = y
    design = torch.einsum("ni,or->nori", x, b).reshape(len(x) * D_OUT, RANK * D_IN)
    fitted_a = torch.linalg.lstsq(design, y.reshape(-1)).solution.reshape(RANK, D_IN)
    torch.testing.assert_close(optimal_b(delta, sigma, a), fitted_b)
    torch.testing.assert_close(optimal_a(delta, b), fitted_a)


def test_shares_equal_the_closed_forms_at_every_rank() -> None:
    delta, sigma, a, b = problem()
    root = root_of(sigma)
    whitened = root.directions(delta.T)
    removable = torch.trace(delta @ sigma @ delta.T)
    over_a = removed_shares(whitened, root.directions(a.T))
    over_b = removed_shares(whitened.T, b)
    for r in range(1, RANK + 1):
        torch.testing.assert_close(over_a[r - 1], 1 - loss_over_a(delta, sigma, a[:r]) / removable)
        torch.testing.assert_close(over_b[r - 1], 1 - loss_over_b(delta, sigma, b[:, :r]) / removable)


def test_the_removed_loss_is_the_squared_whitened_norm_of_the_update() -> None:
    delta, sigma, a, _ = problem()
    update = optimal_b(delta, sigma, a) @ a
    removed = torch.trace(delta @ sigma @ delta.T) - loss_over_a(delta, sigma, a)
    torch.testing.assert_close(torch.trace(update @ sigma @ update.T), removed)


@pytest.mark.parametrize(
    ("spectrum", "b", "a", "tolerance"),
    [("isotropic", 0.0078, 0.0078, 2e-4), ("1/i", 0.108, 0.0078, 0.015), ("rank r", 1.0, 0.0078, 2e-3)],
)
def test_simulation_reproduces_the_papers_asymmetry(spectrum: str, b: float, a: float, tolerance: float) -> None:
    """The paper's values for d = 512 and r = 4."""
    shares = simulate(spectrum)
    assert float(shares["B"].mean[-1]) == pytest.approx(b, abs=tolerance)
    assert float(shares["A"].mean[-1]) == pytest.approx(a, abs=2e-3)
    assert shares["B"].low[-1] <= shares["B"].mean[-1] <= shares["B"].high[-1]


def test_the_expected_share_over_a_random_b_is_rank_over_width() -> None:
    whitened = draw(40, 30)
    share = expected_share(whitened, identity_root(40), 20)
    exact = share_over_b(40, 20).mean
    assert float(exact[9]) == 0.25
    assert ((share.low - exact < 0.01) & (exact - share.high < 0.01)).all()
    assert (share.mean - exact).abs().max() < 0.02


def test_a_rank_of_at_least_that_of_the_inputs_removes_everything() -> None:
    x = draw(4, 12)
    root = root_of(x.T @ x)
    share = expected_share(root.directions(draw(12, 5)), root, 8)
    assert len(root.values) == 4
    assert share.mean[2] < 1
    torch.testing.assert_close(share.mean[3:], torch.ones(5, dtype=torch.float64))


def linear_network(tokens: int) -> tuple[Moments, Tensor, Tensor, Tensor]:
    """Return moments, Δ, x and the gradient of a zero weight W, for y = W·x and the squared error to Δ·x.

    The moments are added in two batches with padding.
    """
    delta, sigma, _, _ = problem()
    x = draw(tokens, D_IN, seed=5) @ torch.linalg.cholesky(sigma).T
    weight = torch.zeros(D_OUT, D_IN, dtype=torch.float64, requires_grad=True)
    output = x @ weight.T
    output.retain_grad()
    loss = (output - x @ delta.T).square().sum() / 2
    loss.backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    assert weight.grad is not None
    moments = Moments(D_IN, D_OUT)
    padding = torch.ones(3, D_IN, dtype=torch.float64), torch.zeros(3, D_OUT, dtype=torch.float64)
    for inputs, gradient in zip(x.split(tokens // 2), output.grad.split(tokens // 2), strict=True):
        moments.add(torch.cat([inputs, padding[0]]), torch.cat([gradient, padding[1]]))
    return moments, delta, x, weight.grad


def test_moments_are_sums_over_tokens_with_a_gradient() -> None:
    moments, delta, x, weight_gradient = linear_network(40)
    torch.testing.assert_close(moments.inputs, x.T @ x)
    torch.testing.assert_close(moments.gradient, weight_gradient)
    torch.testing.assert_close(moments.outputs, delta @ x.T @ x @ delta.T)
    assert (moments.tokens, moments.idle) == (40, 6)


def test_in_a_linear_network_least_squares_finds_delta() -> None:
    moments, delta, _, _ = linear_network(40)
    theory = theory_of(moments, RANK)
    forecasts = {(f.trained, f.target, f.outputs): f for f in theory.forecasts}
    assert len(forecasts) == 8
    sigma = moments.inputs
    removable = float(torch.trace(delta @ sigma @ delta.T))
    forecast = forecasts["B", "least squares", "equal"]
    assert forecast.removable == pytest.approx(removable)
    root = root_of(sigma)
    torch.testing.assert_close(forecast.share.mean, expected_share(root.directions(delta.T), root, RANK).mean)
    step = delta @ sigma  # -G
    assert forecasts["A", "gradient step", "equal"].removable == pytest.approx(
        float(torch.trace(step @ sigma @ step.T))
    )
    assert theory.explained == pytest.approx(1.0)
    assert theory.explained_by_chance == pytest.approx(D_IN / 40)
    torch.testing.assert_close(theory.eigenvalues.sum(), torch.trace(sigma) / 40)


@pytest.mark.parametrize("outputs", ["equal", "gradients"])
@pytest.mark.parametrize("target", ["least squares", "gradient step"])
def test_the_removable_loss_is_a_sum_over_tokens(target: str, outputs: str) -> None:
    """Projections with unequal numbers of tokens are weighed against each other by these sums."""
    x, g = draw(60, D_IN), draw(60, D_OUT, seed=1)
    found = {}
    for copies in (1, 3):
        moments = Moments(D_IN, D_OUT)
        for _ in range(copies):
            moments.add(x, g)
        forecasts = theory_of(moments, RANK).forecasts
        found[copies] = next(f.removable for f in forecasts if (f.target, f.outputs) == (target, outputs))
    sigma, mean_gradient, f = x.T @ x / 60, g.T @ x / 60, g.T @ g / 60
    weight = torch.eye(D_OUT, dtype=torch.float64) if outputs == "equal" else f
    for copies, removable in found.items():
        n = 60 * copies
        least_squares = -torch.linalg.inv(weight) @ mean_gradient @ torch.linalg.inv(sigma)
        delta = least_squares if target == "least squares" else -n * mean_gradient
        assert removable == pytest.approx(float(n * torch.trace(weight @ delta @ sigma @ delta.T)))


def test_forecasts_with_weighted_outputs_are_symmetric_in_the_factors() -> None:
    """If outputs are weighted by their gradients, swapping x and g swaps A and B."""
    x, g = draw(60, 8), draw(60, 8, seed=1) * torch.arange(1, 9)
    moments, swapped = Moments(8, 8), Moments(8, 8)
    moments.add(x, g)
    swapped.add(g, x)
    theory, theory_of_swapped = theory_of(moments, 4), theory_of(swapped, 4)
    for f in theory.forecasts:
        if f.outputs == "gradients":
            mirrored = next(
                m
                for m in theory_of_swapped.forecasts
                if m.outputs == "gradients" and m.target == f.target and m.trained != f.trained
            )
            torch.testing.assert_close(f.share.mean, mirrored.share.mean)
            assert f.removable == pytest.approx(mirrored.removable)


def test_gradients_unrelated_to_the_inputs_are_explained_by_chance_alone() -> None:
    moments = Moments(20, 5)
    moments.add(draw(2000, 20), draw(2000, 5, seed=1))
    theory = theory_of(moments, 4)
    assert theory.explained == pytest.approx(theory.explained_by_chance, rel=0.3)
    assert theory.explained_by_chance == 0.01
    assert theory.input_rank == pytest.approx(20, abs=0.3)


@pytest.mark.parametrize(("trained", "width"), [("B", 200), ("A", 100), ("both", 300)])
def test_the_bound_depends_on_the_number_of_trained_parameters(trained: str, width: int) -> None:
    bound = generalisation_bound([(4, 100, 200), (4, 100, 200)], trained, samples=1000, bits=16, sigma=0.5)  # type: ignore[arg-type]
    assert bound == pytest.approx(math.sqrt(2 * 4 * 16 * 0.25 * math.log(2) / 1000 * 2 * width))
