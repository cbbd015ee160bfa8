"""Spectral filters: the leading eigenvectors of a Hankel matrix, computed without the matrix.

The Hankel matrices of spectral filtering are Gram matrices of decaying exponentials,

    hankel:    Z[i, j] = 2 / (n^3 - n)                                    = int_0^1  (1 - a)^2   a^(n-2) da
    hankel_l:  Z[i, j] = (1 + (-1)^n) 8 / ((n - 1)(n + 1)(n + 3))         = int_-1^1 (1 - a^2)^2 a^(n-2) da

with n = i + j and i, j = 1..L. Substituting a = exp(-e^s), the trapezoid rule in s converges exponentially, so a few
hundred nodes give Z = V V^T to machine precision with V of shape (L, nodes). The left singular vectors of V are the
filters and its squared singular values the eigenvalues. The columns of V are decaying exponentials, so V is compressed
to a few hundred rows first (CompressedLags). Cost is O(L filters) instead of O(L^3), and small eigenvalues keep their
relative accuracy because the decomposition sees their square roots.

Tensor filters of length S^2 are the Kronecker products of the scaled filters of length S: an exponential a^t with
t = S i + j is (a^S)^i a^j, so k filters for either factor span it with k^2 products.

Source: Agarwal et al. 2023, Spectral State Space Models (arXiv 2312.06837), section 3; Liu et al. 2024, Flash STU
(arXiv 2409.10489), for hankel_l and the sigma^(1/4) scaling; Marsden et al. 2024, Provable Length Generalization in
Sequence Prediction via Spectral Filtering (arXiv 2411.01035), section 4, for tensor filters.
"""

import hashlib
import math
import zlib
from contextlib import suppress
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from flash_stu.errors import UserError, WriteError
from flash_stu.files import replacing_file
from flash_stu.filters.lags import CompressedLags
from flash_stu.reading import read_regular

BASES = ("hankel", "hankel_l")  # of sums of decaying exponentials
TENSOR = "tensor"
_QUADRATURE_STEP = 0.12  # in s; halving it changes no eigenvalue above 1e-13 of the first by more than 1e-11 of itself
_REVISION = 2  # part of the cache key: raise it when the numbers change


def spectral_filters(seq_len: int, num_filters: int, basis: str = "hankel") -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the leading spectral filters, or read them from the user's cache.

    An eigenvector has no sign of its own and LAPACK builds differ, so the sign is fixed: the entry of largest
    magnitude is positive (the earliest one, if several agree to 1e-6). Trained weights therefore mean the same on
    every machine. Eigenvalues are accurate down to about 1e-29 of the largest (the 56th at length 8192, the 28th at
    64); filters past that are still orthonormal, but rounding decides what they are.

    Args:
        seq_len: length L of the filters, in tokens.
        num_filters: how many filters K to keep, at most L.
        basis: "hankel" (eigenvalues of the observed system in [0, 1]), "hankel_l" ([-1, 1]) or "tensor" (the products
            of sqrt(num_filters) hankel filters with each other, cut to seq_len where that is no square).

    Returns:
        eigenvalues sigma (num_filters,), largest first, and filters phi (seq_len, num_filters) whose columns are the
        unit eigenvectors times sigma^(1/4); float64, on the CPU. Of tensor filters sigma are the products.

    Raises:
        UserError: for a length or count that is not positive, more filters than the length or the quadrature
            allows, a number of tensor filters that is not a square, or an unknown basis.
    """
    if basis not in (*BASES, TENSOR):
        raise UserError(f"filter_basis is {basis!r}; allowed: {', '.join((*BASES, TENSOR))}")
    if seq_len < 1 or not 1 <= num_filters <= seq_len:
        raise UserError(f"num_filters is {num_filters} for filters of length {seq_len}; allowed: 1 to the length")
    path = _cache_path(seq_len, num_filters, basis)
    cached = _read_cache(path, seq_len, num_filters)
    if cached is None:
        cached = compute_filters(seq_len, num_filters, basis)
        _write_cache(path, *cached)
    return cached


def compute_filters(seq_len: int, num_filters: int, basis: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As `spectral_filters`, without the cache."""
    if basis == TENSOR:
        return _tensor_filters(seq_len, num_filters)
    if basis == "hankel":
        lags = torch.arange(seq_len, dtype=torch.float64)
        sigma, phi = _eigenpairs(lags, num_filters, basis)
    else:
        # a -> -a leaves the integrand alone but for the sign of odd lags: even and odd lags are separate problems.
        sigma = torch.zeros(0, dtype=torch.float64)
        phi = torch.zeros(seq_len, 0, dtype=torch.float64)
        for parity in range(min(2, seq_len)):
            lags = torch.arange(parity, seq_len, 2, dtype=torch.float64)
            values, vectors = _eigenpairs(lags, min(num_filters, len(lags)), basis)
            columns = torch.zeros(seq_len, len(values), dtype=torch.float64)
            columns[parity::2] = vectors
            sigma, phi = torch.cat([sigma, values]), torch.cat([phi, columns], dim=1)
        order = sigma.argsort(descending=True, stable=True)[:num_filters]
        sigma, phi = sigma[order], phi[:, order]
    if len(sigma) < num_filters:
        raise UserError(f"num_filters is {num_filters}; at length {seq_len} at most {len(sigma)} can be computed")
    return sigma, (_fix_signs(phi) * sigma**0.25).contiguous()


def _tensor_filters(seq_len: int, num_filters: int) -> tuple[torch.Tensor, torch.Tensor]:
    side, count = math.isqrt(seq_len - 1) + 1, math.isqrt(num_filters)
    if count**2 != num_filters:
        raise UserError(f"num_filters is {num_filters}; allowed with filter_basis tensor: squares, such as {count**2}")
    sigma, phi = compute_filters(side, count, "hankel")
    sigma, phi = torch.kron(sigma, sigma), torch.kron(phi, phi)[:seq_len]
    order = sigma.argsort(descending=True, stable=True)
    return sigma[order], phi[:, order].contiguous()


def _eigenpairs(lags: torch.Tensor, count: int, basis: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns eigenpairs of the Gram matrix over the given lags, through QR and the SVD of the small factor."""
    first, last = math.log(1e-5 / (lags[-1] + 1)), math.log(60.0)
    rate = torch.linspace(first, last, math.ceil((last - first) / _QUADRATURE_STEP), dtype=torch.float64).exp()
    # sqrt of the integrand's weight and of |da/ds| = e^s exp(-e^s), in forms that do not cancel near a = 1
    step = (last - first) / (len(rate) - 1)
    gap = -torch.expm1(-rate) if basis == "hankel" else -torch.expm1(-2 * rate)
    sides = 1.0 if basis == "hankel" else 2.0
    weight = gap * (sides * step * rate).sqrt()
    compressed = CompressedLags(len(lags))
    points = lags[0] + (lags[-1] - lags[0]) / max(1, len(lags) - 1) * compressed.points
    factor = compressed.compress(torch.outer(points + 0.5, -rate).exp() * weight)
    u, s, _ = torch.linalg.svd(factor, full_matrices=False)
    return s[:count] ** 2, compressed.expand(u[:, :count])


def _fix_signs(phi: torch.Tensor) -> torch.Tensor:
    magnitude = phi.abs()
    largest = (magnitude >= magnitude.amax(dim=0) * (1 - 1e-6)).to(torch.int8).argmax(dim=0)
    return phi * phi.gather(0, largest[None]).sign()


def _cache_path(seq_len: int, num_filters: int, basis: str) -> Path:
    key = f"{basis}-L{seq_len}-K{num_filters}-r{_REVISION}-{_QUADRATURE_STEP}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    name = f"{basis}-{seq_len}-{num_filters}-{digest}.safetensors"
    return Path(platformdirs.user_cache_dir("flash_stu")) / "filters" / name


def _read_cache(path: Path, seq_len: int, num_filters: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns an entry, or None if there is none or it is not, bit for bit, as it was written."""
    try:
        tensors = load(read_regular(path))
        sigma, phi, checksum = tensors["sigma"], tensors["phi"], int(tensors["checksum"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None
    shaped = sigma.shape == (num_filters,) and phi.shape == (seq_len, num_filters)
    typed = sigma.dtype == phi.dtype == torch.float64
    finite = all(bool(tensor.isfinite().all()) for tensor in (sigma, phi))
    return (sigma, phi) if shaped and typed and finite and checksum == _checksum(sigma, phi) else None


def _write_cache(path: Path, sigma: torch.Tensor, phi: torch.Tensor) -> None:
    with suppress(WriteError), replacing_file(path) as temporary:  # else the filters are computed each time
        save_file({"sigma": sigma, "phi": phi, "checksum": torch.tensor(_checksum(sigma, phi))}, temporary)


def _checksum(sigma: torch.Tensor, phi: torch.Tensor) -> int:
    return zlib.crc32(phi.contiguous().numpy().data, zlib.crc32(sigma.contiguous().numpy().data))
