"""ReBased: linear attention with a learned quadratic kernel of normalised queries and keys.

Linear Transformers with Learnable Kernel Functions (arXiv 2402.10644, section 4). Notable: Based's
1 + a + a^2 / 2 has a least value that training cannot move; the square of a product of
gamma norm(x) + beta, with gamma and beta of queries and of keys, can be 0 anywhere. norm is a layer
norm. A sum of weights below 1e-5 counts as 1e-5, where the released code adds it. Weights start at
variance 1 / fan-in, gamma at 1, beta at 0.
"""

import dataclasses

from flax import nnx

from models import layers, mixer, weights
from models.parts import features

LEAST = 1e-5


@dataclasses.dataclass
class Config(features.Settings):
    """Heads of few keys, as in Based."""

    key_dim: int = 16  # per head; the state has K (K + 1) / 2 rows

    def build(self, width: int, rngs: nnx.Rngs) -> "Mixer":
        """The module; ValueError where heads or key_dim do not fit."""
        return Mixer(self, width, rngs)


CASES = {"rebased": Config()}


class Mixer(features.FeatureMixer):
    """o_t = sum_s w_ts v_s / sum_s w_ts, w_ts = (q'_t k'_s)^2 / K, x' = gamma norm(x) + beta."""

    def __init__(self, config: Config, width: int, rngs: nnx.Rngs):
        key = config.key_dim
        if key < 2:
            raise ValueError(f"key_dim={key} must be at least 2 to be normed; the paper uses 16.")
        super().__init__(config, width, rngs, rows=lambda key: key * (key + 1) // 2)
        self.gamma = weights.filled(rngs, 1.0, (2, key), ("parts", "key"))
        self.beta = weights.filled(rngs, 0.0, (2, key), ("parts", "key"))

    def __call__(self, x, *, segments=None, state=None):
        qk_BTPHK = self.queries_keys(x).astype(mixer.wide(x.dtype))
        gamma_P1K, beta_P1K = self.gamma[...][:, None], self.beta[...][:, None]
        qk_BTPHK = layers.layer_norm(qk_BTPHK, gamma_P1K, beta_P1K)
        f_BTPHF = features.quadratic(qk_BTPHK * qk_BTPHK.shape[-1] ** -0.25)
        q_BTHF, k_BTHF = f_BTPHF[:, :, 0], f_BTPHF[:, :, 1]
        return self.read(x, q_BTHF, k_BTHF, segments=segments, state=state, least=LEAST)
