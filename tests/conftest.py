"""Every test runs on eight virtual CPU devices, with array shapes checked at run time."""

from pathlib import Path

import jax
import jaxtyping

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

KERNELS = Path(__file__).parents[1] / "kernels"


def checked_modules() -> list[str]:
    """Modules whose jaxtyping annotations are enforced: models, and kernels but for the api files.

    An api.py checks its arguments itself and says in one line what is wrong; the tests of those
    lines need the call to reach them.
    """
    files = [path for path in KERNELS.rglob("*.py") if path.stem not in ("api", "__init__")]
    names = [".".join(path.relative_to(KERNELS.parent).with_suffix("").parts) for path in files]
    return ["models", *sorted(names)]


jaxtyping.install_import_hook(checked_modules(), "beartype.beartype")
