"""Products with Toeplitz matrices by discrete Fourier transforms, with their own backward pass.

Two forms of the transform give the same numbers. "fft" is XLA's: fast on CPUs and GPUs. "matmul"
multiplies by the matrix of the transform, up to DENSE points at once and beyond as N = A B points
in two steps, A and then B, with a twiddle in between (the Monarch decomposition of FlashFFTConv,
arXiv:2311.05908, section 3.1). On a TPU that is what the hardware is for, while XLA's own transform
takes minutes to compile there. Rows and columns that meet only zeros are left out, and frequencies
stay in the order in which they come, for they are only multiplied.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Complex, Float, Int

from kernels.products import HIGHEST

FORMS = ("fft", "matmul")
DENSE = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def toeplitz(
    x: Float[Array, "B G R S D"],
    taps: Float[Array, "K 2*S D"],
    documents: Int[Array, "B G R"] | None,
    form: str,
) -> Float[Array, "B G R S D"]:
    """y_i = sum over j = i .. i-K+1 of T_{i-j} x_j, for i = 0 .. R-1 within each of G groups.

    x_j and y_i are blocks of S tokens and T_l is a Toeplitz matrix, (T_l)_ts = taps[l, S + t - s],
    for every channel its own. With `documents`, block j counts for i only where both have the same
    number. S is a power of 2.
    """
    size = taps.shape[1]
    spectrum, factor = _to(x, size, 0, form), _to(taps, size, 0, form)
    total = jnp.zeros_like(spectrum)
    for lag in range(factor.shape[0]):
        total = total + _where_same(documents, lag, _shift(spectrum, lag) * factor[lag])
    return _back(total, size, size // 2, size, form)


def _forward(x, taps, documents, form):
    return toeplitz(x, taps, documents, form), (x, taps, documents)


def _backward(form, residuals, dy):
    """Both gradients are correlations: products with a conjugate."""
    x, taps, documents = residuals
    size = taps.shape[1]
    spectrum, factor = _to(x, size, 0, form), _to(taps, size, 0, form)
    slope = _to(dy, size, size // 2, form)
    total, products = jnp.zeros_like(spectrum), []
    for lag in range(factor.shape[0]):
        same = _where_same(documents, lag, slope)
        total = total + _shift(same * jnp.conj(factor[lag]), -lag)
        products.append(jnp.sum(same * jnp.conj(_shift(spectrum, lag)), axis=(0, 1, 2)))
    dx = _back(total, size, 0, size // 2, form)
    return dx, _back(jnp.stack(products), size, 0, size, form), None


toeplitz.defvjp(_forward, _backward)


def _shift(blocks, lag):
    """Block j at j + lag, with zeros behind."""
    zero = jnp.zeros((), blocks.dtype)
    rest = [(0, 0, 0)] * 2
    return jax.lax.pad(blocks, zero, [*rest, (lag, -lag, 0), *rest])


def _where_same(documents, lag, blocks):
    """Zero in blocks whose document is not that of the block `lag` before."""
    if documents is None or lag == 0:
        return blocks
    same = jnp.pad(documents, ((0, 0), (0, 0), (lag, 0)))[..., :-lag] == documents
    # A product, because XLA writes out the mask of a selection in full, for every lag, on TPUs.
    return blocks * same[..., None, None].astype(jnp.float32)


def _to(x, size, start, form):
    """The spectrum of `size` tokens that are x from `start` on, else zeros; two axes a block."""
    if form == "matmul":
        return _multiply(x, size, start)
    behind = size - start - x.shape[-2]
    return _rfft(jnp.swapaxes(_pad(x, start, behind), -2, -1), size)


def _back(spectrum, size, start, stop, form):
    """Tokens start .. stop-1 of the `size` with this spectrum."""
    if form == "matmul":
        return _multiply_back(spectrum, size, start, stop)
    return jnp.swapaxes(_irfft(spectrum, size)[..., start:stop], -2, -1)


def _row_by_row(function, rule):
    """`function(rows, size)` of the last axis alone, which keeps all others split over a mesh.

    XLA would gather the whole array onto every device before a transform.
    """

    def spread(mesh, argument):
        split = tuple(argument.sharding.spec) + (None,) * argument.ndim
        return NamedSharding(mesh, P(*split[: argument.ndim - 1], None))

    def infer(size, mesh, arguments, result):
        return spread(mesh, arguments[0])

    def partition(size, mesh, arguments, result):
        rows = spread(mesh, arguments[0])
        return mesh, lambda x: function(x, size), rows, (rows,)

    whole = custom_partitioning(function, static_argnums=(1,))
    whole.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)

    def call(x, size):
        mapped = jax.custom_batching.custom_vmap(lambda x: whole(x, size))
        mapped.def_vmap(lambda _, batched, x: (mapped(x), batched[0]))
        return mapped(x)

    return call


_rfft = _row_by_row(lambda x, size: jnp.fft.rfft(x, n=size), "... t -> ... f")
_irfft = _row_by_row(lambda spectrum, size: jnp.fft.irfft(spectrum, n=size), "... f -> ... t")


def _multiply(x: Float[Array, "... S D"], size: int, start: int) -> Complex[Array, "... F D"]:
    """Half the spectrum: frequency m + A l at (m, l), m = 0 .. A/2, for the rest mirrors it."""
    outer, twiddle, inner = _matrices(size)
    points = inner.shape[0]
    first, last = start // points, -(-(start + x.shape[-2]) // points)
    x = _pad(x, start - first * points, last * points - start - x.shape[-2])
    matrix = np.concatenate([np.real(outer), np.imag(outer)], axis=1)[first:last]
    if points == 1:
        return jax.lax.complex(*jnp.split(_dot("...ad,am->...md", x, matrix), 2, axis=-2))
    z_ABD = x.reshape(*x.shape[:-2], -1, points, x.shape[-1])
    z_MBD = jax.lax.complex(*jnp.split(_dot("...abd,am->...mbd", z_ABD, matrix), 2, axis=-3))
    z_MLD = _multiply_complex(z_MBD * twiddle[..., None].astype(z_MBD.dtype), inner)
    return z_MLD.reshape(*x.shape[:-2], -1, x.shape[-1])


def _multiply_back(
    spectrum: Complex[Array, "... F D"], size: int, start: int, stop: int
) -> Float[Array, "... C D"]:
    outer, twiddle, inner = _matrices(size)
    points = inner.shape[0]
    first, last = start // points, -(-stop // points)
    # Of a frequency that stands for its mirror as well, twice the real part counts.
    weights = np.full(outer.shape[1], 2.0)
    weights[0] = weights[outer.shape[0] // 2] = 1
    outer = outer * weights / size
    matrix = np.concatenate([np.real(outer), np.imag(outer)], axis=1)[first:last]
    if points == 1:
        parts = jnp.concatenate([spectrum.real, spectrum.imag], axis=-2)
        return _dot("...md,am->...ad", parts, matrix)
    *rows, _, channels = spectrum.shape
    z_MLD = spectrum.reshape(*rows, -1, points, channels)
    z_MBD = _multiply_complex(z_MLD, inner.conj()) * twiddle[..., None].conj().astype(z_MLD.dtype)
    parts = jnp.concatenate([z_MBD.real, z_MBD.imag], axis=-3)
    x_ABD = _dot("...mbd,am->...abd", parts, matrix)
    x = x_ABD.reshape(*rows, -1, channels)
    return x[..., start - first * points : stop - first * points, :]


def _multiply_complex(
    z: Complex[Array, "... M B D"], matrix: np.ndarray
) -> Complex[Array, "... M B D"]:
    """The matrix, which is symmetric, times z along B, as one real product."""
    real, imag = np.real(matrix), np.imag(matrix)
    both = np.block([[real, imag], [-imag, real]])
    parts = jnp.concatenate([z.real, z.imag], axis=-2)
    return jax.lax.complex(*jnp.split(_dot("...mbd,bl->...mld", parts, both), 2, axis=-2))


@functools.cache
def _matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp(-2 pi i ...) of the outer half transform (A, A/2 + 1), the twiddle, the inner (B, B)."""
    inner = 1 if size <= DENSE else 1 << math.ceil(math.log2(size)) // 2
    outer = size // inner

    def root(left, right, points):
        return np.exp(-2j * np.pi * (np.outer(np.arange(left), np.arange(right)) % points) / points)

    kept = outer // 2 + 1
    return root(outer, kept, outer), root(kept, inner, size), root(inner, inner, inner)


def _dot(spec: str, x: Array, matrix: np.ndarray) -> Array:
    return jnp.einsum(spec, x, matrix.astype(x.dtype), precision=HIGHEST)


def _pad(x: Array, before: int, behind: int) -> Array:
    """Zeros around the tokens, the last axis but one."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((before, behind), (0, 0)))
