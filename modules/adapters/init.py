"""Initialisers of the factors A and B.

Every factor is drawn in float32 on the CPU from a generator of its own, seeded by (seed, name of the projection,
factor): the same factor comes out whatever the device, the precision, the order or the other targets.

With n the long side (d_in for A, d_out for B) and r the rank, the r vectors of length n (rows of A, columns of B) are

| name       | entries                                   | norm of a vector                     |
|------------|-------------------------------------------|--------------------------------------|
| orthogonal | reduced QR of a Gaussian (Haar)           | 1                                    |
| signs      | ±1/√n with equal odds                     | 1                                    |
| gaussian   | N(0, 1/n)                                 | 1 in the mean square                 |
| uniform    | U(-√(3/n), √(3/n))                        | 1 in the mean square                 |
| kaiming    | LoRA's kaiming_uniform_(a=√5): U(-1/√fan_in, 1/√fan_in) | A: 1/√3, B: √(d_out/3r) |
| svd        | top singular vectors of W, right for A, left for B | 1 (seconds a layer from 2048² on) |
| svd_minor  | minor singular vectors of W, right for A, left for B | 1 (seconds a layer from 2048² on) |
| zero       | 0                                         | 0                                    |
| given      | 0 until a file or a checkpoint gives it   |                                      |

so all but kaiming are matched in scale, and kaiming is as published: a frozen kaiming B is √(d_out/3r) times an
orthogonal one, 5.7 at r = 8 and d_out = 768, which is what makes it collapse in the paper (appendix, B_km Â₀).

Of the min(d_out, d_in) singular vectors of a side, svd takes the r of the largest singular values, and svd_minor the r
of the smallest. svd_minor for a frozen B with A trained from zero is MiCA (arXiv 2604.01694), PEFT's `mica`.

`signs` alone is the same to the bit on every machine and with every version of every library, so that it need not be
saved: its bits are SHAKE-256's (FIPS 202, published test vectors, part of every Python),
one stream a vector, and its only arithmetic is √ and ÷, which IEEE 754 rounds in one way. The others go through
torch's generators or LAPACK, which promise no such thing. Its vectors are orthogonal only on average: the cosine of two
has mean 0 and standard deviation 1/√n. Below some ten entries two may even coincide.
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
    """Return a CPU generator that depends on the seed, the projection's name and the factor alone."""
    digest = hashlib.sha256(f"{seed}/{name}/{factor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def init_factor(init: Start, factor: Factor, weight: Tensor, rank: int, seed: int, name: str) -> Tensor:
    """Draw one factor for a pretrained weight.

    Args:
        init: Initialiser, see the table above.
        factor: A or B.
        weight: The pretrained weight W that is adapted (of a fused layer the slice), (d_out, d_in).
        rank: Rank r, at most min(d_out, d_in).
        seed: Seed of the run's factors.
        name: Name of the projection, unique in the model.

    Returns:
        A as (rank, d_in) or B as (d_out, rank), contiguous float32 on the CPU.
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
        return (vectors.T if factor == "A" else vectors).contiguous()  # LAPACK's Q lies column by column
    tensor = torch.empty(shape)
    if init == "gaussian":
        return tensor.normal_(0.0, 1 / math.sqrt(long_side), generator=generator)
    if init == "uniform":
        bound = math.sqrt(3 / long_side)
        return tensor.uniform_(-bound, bound, generator=generator)
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def sign_factor(factor: Factor, n: int, rank: int, seed: int, name: str) -> Tensor:
    """Return the `signs` of a factor, (rank, n) for A and (n, rank) for B; this definition may never change.

    Entry j of vector i is negative where bit j of SHAKE-256("signs/seed/name/factor/i") is set, counted from the least
    significant bit of the first byte. So a larger rank adds vectors and leaves the others as they are.
    """
    streams = [hashlib.shake_256(f"signs/{seed}/{name}/{factor}/{i}".encode()) for i in range(rank)]
    octets = np.frombuffer(b"".join(s.digest(-(-n // 8)) for s in streams), np.uint8).reshape(rank, -1)
    bits = np.unpackbits(octets, axis=1, count=n, bitorder="little")  # (r, n)
    entry = np.float32(1 / math.sqrt(n))
    vectors = np.where(bits, -entry, entry)
    return torch.from_numpy(np.ascontiguousarray(vectors if factor == "A" else vectors.T))


def _orthonormal_columns(n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return Haar-distributed orthonormal columns, (n, rank).

    Q of the reduced QR of a Gaussian has them, with the diagonal of R made positive.
    """
    q, r = torch.linalg.qr(torch.randn(n, rank, generator=generator), mode="reduced")
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _singular_vectors(weight: Tensor, factor: Factor, rank: int, name: str, minor: bool) -> Tensor:
    """Top or minor singular vectors of W = UΣVᵀ: rows of Vᵀ for A, columns of U for B; largest entry of each positive.

    They come in the order of falling singular values. Of a W without a gap between singular values, as one of zeros,
    they are orthonormal vectors that LAPACK chooses.
    """
    if not weight.isfinite().all():
        raise AdapterError(
            f"adapter.init_{factor.lower()}: the weights of {name} are not finite, so they have no singular vectors. "
            "Use weights without NaN and infinity, or another initialiser."
        )
    u, _, vh = torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False)
    vectors = vh if factor == "A" else u.T  # (min(d_out, d_in), n)
    vectors = vectors[-rank:] if minor else vectors[:rank]  # (r, n)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * largest.sign()  # a singular vector's sign is arbitrary; fix it
    return (vectors if factor == "A" else vectors.T).contiguous()
