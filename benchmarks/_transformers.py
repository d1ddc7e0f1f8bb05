"""`transformers` on a CPU: its own torch code, whatever else is installed or lies beside it.

Import this before the repository's root is on sys.path: transformers looks for a package named
`kernels`, and ours is not the one it means. With flash-linear-attention (or mamba-ssm, or
causal-conv1d) installed it would take that library's Triton functions, which need a GPU.
"""

import importlib.util
import sys

if importlib.util.find_spec("kernels") is not None:
    sys.exit(
        "a package named kernels is importable, and transformers would be misled by it: run this "
        "as a file, python benchmarks/NAME.py, without the repository's root in PYTHONPATH."
    )
for name in ("fla", "mamba_ssm", "causal_conv1d"):
    sys.modules[name] = None  # type: ignore[assignment]
try:
    import torch as torch
    import transformers as transformers
except ImportError as error:
    sys.exit(f"this comparison needs: pip install torch transformers ({error})")
transformers.logging.set_verbosity_error()
