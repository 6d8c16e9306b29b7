"""Closed forms of one-sided adapters in linear regression (Zhu et al. 2024, arXiv 2402.16842, section 4).

The regression has inputs x with second moment Σ (d_in, d_in) and a pretrained weight W. The target is (W + Δ)·x plus
noise of variance σ² in each of the d_out outputs. The loss of an update ΔW is

    d_out·σ² + Tr[(ΔW − Δ)·Σ·(ΔW − Δ)ᵀ].

Without an update, the loss is d_out·σ² + Tr[ΔΣΔᵀ]. The second term is the *removable loss*. The best update of rank r
with one factor frozen removes a *share* of the removable loss. In whitened coordinates, T = Δ·Σ^½, a frozen A projects
the rows of T on the span of A·Σ^½. A frozen B projects the columns of T on the span of B. The removed loss is the
squared norm of the projection, which equals ‖ΔW·Σ^½‖² of the best update.

In a network, `Moments` measures estimates of Σ and Δ; docs/theory.md has the derivation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.adapters.spectrum import summarize

Trained = Literal["B", "A", "both"]
Target = Literal["least squares", "gradient step"]
Outputs = Literal["equal", "gradients"]

DRAWS = 32  # Samples of a random factor.
STUDENT = 2.0395  # 97.5 % quantile of Student's distribution with DRAWS - 1 degrees of freedom.


# ------------------------------------------------------------------------------------------------ random frozen factors


@dataclass(frozen=True)
class Share:
    """Removed share of the removable loss at ranks 1, 2, …. Each field is (ranks,) float64.

    Args:
        mean: Mean over random factors, in [0, 1].
        low: Lower end of the 95 % confidence interval of the mean, which may be below 0.
        high: Upper end of the interval, which may be above 1.
    """

    mean: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Root:
    """Root R = diag(√λ)·Vᵀ of a second moment Σ = RᵀR, by the eigenvalues λ above the rounding error.

    Args:
        values: λ (k,), descending, above 0.
        vectors: V (d, k), orthonormal columns.
    """

    values: Tensor
    vectors: Tensor

    def directions(self, factor: Tensor) -> Tensor:
        """Return R·X, (…, k, r), for X (…, d, r)."""
        return self.values.sqrt()[:, None] * (self.vectors.T @ factor)


def root_of(moment: Tensor) -> Root:
    """Return the root of a second moment without eigenvalues at the rounding error of float64.

    Args:
        moment: (d, d), symmetric and positive semidefinite.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    return Root(values[kept].flip(0), vectors[:, kept].flip(1))


def identity_root(size: int) -> Root:
    """Return the root of the identity matrix."""
    return Root(torch.ones(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64))


def removed_shares(whitened: Tensor, directions: Tensor) -> Tensor:
    """Return the share that a frozen factor removes, at each rank up to the factor's rank.

    Args:
        whitened: Tᵀ = R·Δᵀ (k, d_out) for a frozen A, T (k, d_in) for a frozen B.
        directions: R·Aᵀ or R·B, (…, k, r).

    Returns:
        (…, r): share of the first factor vector, of the first two vectors, and so on.
    """
    basis = torch.linalg.qr(directions).Q  # (…, k, min(k, r)); leading columns span leading columns of `directions`
    shares = (basis.mT @ whitened).square().sum(-1).cumsum(-1) / whitened.square().sum()
    missing = directions.shape[-1] - shares.shape[-1]  # k vectors span the whole space, so the share stays constant.
    return torch.cat([shares, shares[..., -1:].expand(*shares.shape[:-1], missing)], -1)


def random_factors(size: int, rank: int, seed: int) -> Tensor:
    """Return random orthonormal columns, (DRAWS, size, rank) float64. Leading columns are uniformly random too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(DRAWS, size, rank, generator=generator, dtype=torch.float64)).Q


def expected_share(whitened: Tensor, root: Root, rank: int, seed: int = 0) -> Share:
    """Return the expected share over random orthonormal factors, at ranks 1 to `rank`.

    Args:
        whitened: As for `removed_shares`.
        root: Root of the second moment on the frozen factor's side; `identity_root` for B in the paper's regression.
        rank: Largest rank, at most the dimension on the frozen factor's side.
        seed: Seed of the sampled factors.
    """
    draws = removed_shares(whitened, root.directions(random_factors(root.vectors.shape[0], rank, seed)))
    mean, half_width = draws.mean(0), STUDENT * draws.std(0) / math.sqrt(DRAWS)
    return Share(mean, mean - half_width, mean + half_width)


def share_over_b(size: int, rank: int) -> Share:
    """Return the expected share over a random orthonormal B at ranks 1 to `rank`: exactly r / d_out, for any Δ and Σ.

    Args:
        size: d_out.
        rank: Largest rank.
    """
    exact = torch.arange(1, rank + 1, dtype=torch.float64) / size
    return Share(exact, exact, exact)


# ----------------------------------------------------------------------------------------------------------- simulation


def simulate(spectrum: str, size: int = 512, rank: int = 4, seed: int = 0) -> dict[str, Share]:
    """Return the shares that B and A remove in a regression with a Gaussian target.

    Σ is diagonal without loss of generality, since the frozen factors have no preferred direction.

    Args:
        spectrum: Eigenvalues of Σ: `isotropic` is 1 for all, `1/i` is 1/i for the i-th, `rank r` is 1 for the first
            `rank` and 0 for the others.
        size: d_in and d_out.
        rank: r.
        seed: Seed of target and factors.

    Returns:
        Shares by trained factor, `B` (over a random A) and `A` (over a random B), at ranks 1 to r.
    """
    index = torch.arange(1, size + 1, dtype=torch.float64)
    values = {"isotropic": torch.ones_like(index), "1/i": 1 / index, "rank r": (index <= rank).double()}[spectrum]
    delta = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root = root_of(values.diag())
    whitened = root.directions(delta.T)  # (k, d_out)
    return {
        "B": expected_share(whitened, root, rank, seed + 1),
        "A": expected_share(whitened.T, identity_root(size), rank, seed + 2),
    }


# ----------------------------------------------------------------------------------------------------- in a network


class Moments:
    """Sums of x·xᵀ, g·xᵀ and g·gᵀ over tokens, with x a projection's input and g the gradient to its output.

    Tokens with zero gradient, such as padding, cannot change the loss. These tokens are counted in `idle`, not summed.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        device: Device of the float64 sums, which take 8·(d_in² + d_in·d_out + d_out²) bytes.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu") -> None:
        self.inputs = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.gradient = torch.zeros(d_out, d_in, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(d_out, d_out, dtype=torch.float64, device=device)
        self.tokens = 0
        self.idle = 0

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            x: (n, d_in), any floating dtype.
            gradient: Gradient of the loss to the projection's output, (n, d_out).
        """
        reached = gradient.ne(0).any(1)
        x = x[reached].to(self.inputs.device).double()  # (m, d_in)
        g = gradient[reached].to(self.inputs.device).double()  # (m, d_out)
        self.inputs.addmm_(x.T, x)
        self.gradient.addmm_(g.T, x)
        self.outputs.addmm_(g.T, g)
        self.tokens += len(x)
        self.idle += len(gradient) - len(x)


@dataclass(frozen=True)
class Forecast:
    """Expected shares of one projection for one definition of Δ and one weighting of the outputs.

    Args:
        trained: The trained factor; the other factor is random and frozen.
        target: Definition of Δ: `least squares` is Δ = −G·Σ⁻¹, `gradient step` is Δ ∝ −G, with G the mean of g·xᵀ.
        outputs: Weighting of the outputs: `equal` as in the paper, or `gradients` by F, the mean of g·gᵀ.
        removable: n·Tr[ΔΣΔᵀ], the removable loss summed over the n tokens, so that projections with different numbers
            of tokens add up. With `gradients`, n·Tr[FΔΣΔᵀ] with Δ = −F⁻¹·G·Σ⁻¹ as the least squares. A gradient step is
            Δ = −n·G, the gradient to the weight.
        share: Expected share at each rank.
    """

    trained: Trained
    target: Target
    outputs: Outputs
    removable: float
    share: Share


@dataclass(frozen=True)
class ProjectionTheory:
    """Results of the closed forms for one projection.

    Args:
        eigenvalues: Eigenvalues of Σ, the mean of x·xᵀ over tokens, (d_in,), descending; 0 below the rounding error.
        input_rank: Effective rank of Σ: exp of the entropy of its normalised eigenvalues, in [1, d_in].
        gradient_rank: Effective rank of F, the mean of g·gᵀ.
        explained: Tr[GΣ⁻¹Gᵀ] / Tr[F] in [0, 1]: share of the gradients that is linear in the inputs.
        explained_by_chance: Value of `explained` for gradients independent of the inputs: rank(Σ) / tokens.
        forecasts: Shares for each trained factor, target and weighting of outputs.
    """

    eigenvalues: Tensor
    input_rank: float
    gradient_rank: float
    explained: float
    explained_by_chance: float
    forecasts: list[Forecast]


def theory_of(moments: Moments, rank: int) -> ProjectionTheory:
    """Return the closed forms for the measured moments of a projection.

    Args:
        moments: Moments of at least one token.
        rank: Largest rank of the shares, at most min(d_in, d_out).
    """
    d_out, d_in = moments.gradient.shape
    # Sums over tokens for Σ and G, and the mean for F: all `removable` are then sums over tokens.
    inputs, gradients = root_of(moments.inputs.cpu()), root_of(moments.outputs.cpu() / moments.tokens)
    rotated = inputs.vectors.T @ moments.gradient.cpu().T  # Vᵀ·Gᵀ (k, d_out)
    weights: dict[Outputs, Root] = {"equal": identity_root(d_out), "gradients": gradients}
    targets: tuple[Target, ...] = ("least squares", "gradient step")
    forecasts = []
    for (name, outputs), target in itertools.product(weights.items(), targets):
        power = -0.5 if target == "least squares" else 0.5
        whitened = inputs.values.pow(power)[:, None] * (rotated @ outputs.vectors) * outputs.values.pow(power)
        removable = float(whitened.square().sum())
        over_a = expected_share(whitened, inputs, rank)
        over_b = share_over_b(d_out, rank) if name == "equal" else expected_share(whitened.T, outputs, rank)
        forecasts.append(Forecast("B", target, name, removable, over_a))
        forecasts.append(Forecast("A", target, name, removable, over_b))
    eigenvalues = torch.zeros(d_in, dtype=torch.float64)
    eigenvalues[: len(inputs.values)] = inputs.values / moments.tokens
    linear = float((rotated / inputs.values.sqrt()[:, None]).square().sum())
    return ProjectionTheory(
        eigenvalues=eigenvalues,
        input_rank=summarize(inputs.values).effective_rank,
        gradient_rank=summarize(gradients.values).effective_rank,
        explained=linear / float(gradients.values.sum() * moments.tokens),
        explained_by_chance=len(inputs.values) / moments.tokens,
        forecasts=forecasts,
    )


# ------------------------------------------------------------------------------------------------------- generalisation


def generalisation_bound(
    shapes: Sequence[tuple[int, int, int]], trained: Trained, samples: int, bits: int = 32, sigma: float = 0.5
) -> float:
    """Return the bound on |expected loss − training loss|: sqrt((2·q·σ²·ln 2 / n)·Σ r·D).

    D is d_out if B is trained, d_in if A is trained, and d_in + d_out if both are trained (Zhu et al. 2024, section 4,
    from Xu and Raginsky 2017).

    Args:
        shapes: Rank, d_in and d_out of each adapted projection.
        trained: The trained factor.
        samples: Number n of training samples.
        bits: Number q of bits of a parameter.
        sigma: σ of a σ-sub-Gaussian loss; 0.5 for every loss in [0, 1], such as the error rate.
    """
    parameters = sum(rank * (d_in * (trained != "B") + d_out * (trained != "A")) for rank, d_in, d_out in shapes)
    return math.sqrt(2 * bits * sigma**2 * math.log(2) / samples * parameters)
