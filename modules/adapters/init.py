"""Initialisers of the factors A and B.

Every factor is drawn in float32 on the CPU. Each factor has its own generator, seeded by (seed, name of the projection,
factor). A factor therefore does not depend on the device, the precision, the order or the other targets.

A factor has r vectors of length n: rows of A with n = d_in, columns of B with n = d_out. The initialisers are

| name       | entries                                   | norm of a vector                     |
|------------|-------------------------------------------|--------------------------------------|
| orthogonal | reduced QR of a Gaussian (Haar)           | 1                                    |
| signs      | ±1/√n with equal probability              | 1                                    |
| gaussian   | N(0, 1/n)                                 | 1 in the mean square                 |
| uniform    | U(-√(3/n), √(3/n))                        | 1 in the mean square                 |
| kaiming    | LoRA's kaiming_uniform_(a=√5): U(-1/√fan_in, 1/√fan_in) | A: 1/√3, B: √(d_out/3r) |
| svd        | top singular vectors of W, right for A, left for B | 1                                    |
| svd_minor  | minor singular vectors of W, right for A, left for B | 1                                    |
| zero       | 0                                         | 0                                    |
| given      | 0 until a file or a checkpoint is loaded  |                                      |

All initialisers except `kaiming` have the same scale. `kaiming` has the published scale: a frozen B is √(d_out/3r)
times as large as with `orthogonal`, 5.7 times at r = 8 and d_out = 768. This scale makes training collapse in the paper
(appendix, B_km Â₀).

W has min(d_out, d_in) singular vectors on each side. `svd` selects the r vectors with the largest singular values.
`svd_minor` selects the r vectors with the smallest. MiCA (arXiv 2604.01694, PEFT's `mica`) is `svd_minor` for a frozen
B, with A trained from zero. For a W of 2048² or more, both take seconds.

A factor of `signs` is bit-identical on every machine and with every library version, so it need not be saved. The
bits are the output of SHAKE-256 (FIPS 202), one stream for each vector. The only arithmetic is √ and ÷, for which IEEE
754 prescribes the rounding. The other initialisers use torch's generators or LAPACK, which do not guarantee identical
bits. The vectors of `signs` are orthogonal only on average: the cosine of two vectors has mean 0 and standard
deviation 1/√n. Two vectors of fewer than about ten entries may even be equal.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .config import AdapterError, Start

Factor = Literal["A", "B"]


def factor_generator(seed: int, name: str, factor: Factor) -> torch.Generator:
    """Return a CPU generator that depends only on the seed, the projection's name and the factor."""
    digest = hashlib.sha256(f"{seed}/{name}/{factor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def init_factor(init: Start, factor: Factor, weight: Tensor, rank: int, seed: int, name: str) -> Tensor:
    """Draw one factor for a pretrained weight.

    Args:
        init: Initialiser from the table above.
        factor: A or B.
        weight: The pretrained weight W (d_out, d_in) of the projection.
        rank: Rank r, at most min(d_out, d_in).
        seed: Seed of the run's factors.
        name: Name of the projection, unique in the model.

    Returns:
        A as (rank, d_in) or B as (d_out, rank), contiguous float32 on the CPU.

    Raises:
        AdapterError: If `init` is `svd` or `svd_minor` and the weight is not finite.
    """
    d_out, d_in = weight.shape
    shape = (rank, d_in) if factor == "A" else (d_out, rank)
    if init in ("zero", "given"):
        return torch.zeros(shape)
    if init in ("svd", "svd_minor"):
        return _singular_vectors(weight, factor, rank, name, minor=init == "svd_minor")
    long_side = d_in if factor == "A" else d_out
    if init == "signs":
        return sign_factor(factor, long_side, rank, seed, name)
    generator = factor_generator(seed, name, factor)
    if init == "orthogonal":
        vectors = _orthonormal_columns(long_side, rank, generator)  # (n, r)
        return (vectors.T if factor == "A" else vectors).contiguous()
    tensor = torch.empty(shape)
    if init == "gaussian":
        return tensor.normal_(0.0, 1 / math.sqrt(long_side), generator=generator)
    if init == "uniform":
        bound = math.sqrt(3 / long_side)
        return tensor.uniform_(-bound, bound, generator=generator)
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def sign_factor(factor: Factor, n: int, rank: int, seed: int, name: str) -> Tensor:
    """Return a factor of the initialiser `signs`, (rank, n) for A and (n, rank) for B.

    This definition must never change, since saved files rely on it. Entry j of vector i is negative if bit j of
    SHAKE-256("signs/seed/name/factor/i") is set, counted from the least significant bit of the first byte. A larger
    rank appends vectors and keeps the earlier vectors.
    """
    streams = [hashlib.shake_256(f"signs/{seed}/{name}/{factor}/{i}".encode()) for i in range(rank)]
    octets = np.frombuffer(b"".join(s.digest(-(-n // 8)) for s in streams), np.uint8).reshape(rank, -1)
    bits = np.unpackbits(octets, axis=1, count=n, bitorder="little")  # (r, n)
    entry = np.float32(1 / math.sqrt(n))
    vectors = np.where(bits, -entry, entry)
    return torch.from_numpy(np.ascontiguousarray(vectors if factor == "A" else vectors.T))


def _orthonormal_columns(n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return Haar-distributed orthonormal columns, (n, rank).

    The columns are Q of the reduced QR decomposition of a Gaussian, with signs that make the diagonal of R positive.
    """
    q, r = torch.linalg.qr(torch.randn(n, rank, generator=generator), mode="reduced")
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _singular_vectors(weight: Tensor, factor: Factor, rank: int, name: str, minor: bool) -> Tensor:
    """Return the top or minor singular vectors of W = UΣVᵀ: rows of Vᵀ for A, columns of U for B.

    The vectors are in the order of descending singular values. The entry of each vector with the largest
    absolute value is positive. If singular values are equal, LAPACK chooses the vectors.
    """
    if not weight.isfinite().all():
        raise AdapterError(
            f"adapter.init_{factor.lower()}: the weights of {name} are not finite, so they have no singular vectors. "
            "Use finite weights or another initialiser."
        )
    u, _, vh = torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False)
    vectors = vh if factor == "A" else u.T  # (min(d_out, d_in), n)
    vectors = vectors[-rank:] if minor else vectors[:rank]  # (r, n)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * largest.sign()  # The sign of a singular vector is arbitrary and would depend on LAPACK.
    return (vectors if factor == "A" else vectors.T).contiguous()
