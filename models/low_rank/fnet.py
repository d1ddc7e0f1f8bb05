"""FNet: tokens mixed by a Fourier transform over time and channels, without a weight.

FNet: Mixing Tokens with Fourier Transforms (arXiv 2105.03824, eq. 3). Notable: the real part alone
is kept, of the transform over the document's own length. Deviation: the transform is unitary,
divided by sqrt(T D), as nothing norms it after (the paper's encoder norms after the mixer). Rows
that are one document take the FFT; packed rows, where every document has a length of its own, take
its matrix, whose T^2 numbers a row are formed in whole.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels import segments as boundaries
from models import cache, mixer
from models.parts import documents


@dataclasses.dataclass
class Config:
    """Nothing to set."""

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module, for every width."""
        return Mixer()


class Mixer(mixer.Mixer):
    """y = Re(F_time(F_channels(x))), F the unitary discrete Fourier transform."""

    causal = False

    def __call__(self, x, *, segments=None, state=None):
        if state is not None:
            raise documents.no_state("fnet")
        z_BTD = jnp.fft.fft(x.astype(mixer.wide(x.dtype)), axis=-1, norm="ortho")
        if segments is None:
            y_BTD = jnp.fft.fft(z_BTD, axis=1, norm="ortho").real
        else:
            cos_BTS, sin_BTS = _transform(segments, z_BTD.real.dtype)
            y_BTD = jnp.einsum("bts,bsd->btd", cos_BTS, z_BTD.real)
            y_BTD += jnp.einsum("bts,bsd->btd", sin_BTS, z_BTD.imag)
        return y_BTD.astype(x.dtype), ()

    def init_state(self, batch: int, capacity: int, dtype: DTypeLike = jnp.float32):
        """Raises ValueError: it reads the whole document."""
        raise documents.no_state("fnet")


def _transform(
    segments: Int[Array, "B T"], dtype
) -> tuple[Float[Array, "B T S"], Float[Array, "B T S"]]:
    """cos and sin of 2 pi n m / L, over sqrt(L), between tokens n, m of a document of length L."""
    batch, count = segments.shape
    real, document = boundaries.is_real(segments), boundaries.ordinals(segments)
    same = (document[:, :, None] == document[:, None]) & real[:, :, None] & real[:, None]
    length = jnp.maximum(same.sum(-1, keepdims=True), 1)
    position, _ = cache.document_positions(jnp.zeros(batch, jnp.int32), segments, count)
    # Whole turns are dropped before the angle is formed, so that long documents keep their digits.
    turn = (position[:, :, None] * position[:, None] % length).astype(dtype) / length
    scale = jnp.where(same, 1 / jnp.sqrt(length.astype(dtype)), 0)
    return scale * jnp.cos(2 * jnp.pi * turn), scale * jnp.sin(2 * jnp.pi * turn)
