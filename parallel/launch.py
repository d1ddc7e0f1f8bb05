"""What a program does before JAX starts: flags of the compiler, and the platform.

Every program of this repository calls `prepare()` first. XLA reads its flags and JAX its platform
once, so later is too late; nothing here imports JAX.
"""

import glob
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# Flags that a version of jaxlib needs. 0.10.2 hands reductions on a CPU to a library that adds
# some of them up wrongly and ends the process on others (jax-ml/jax 39103, 39257, 40412); without
# it all other fusions stay. Other versions need not know the flag, and a flag that is unknown
# aborts the process.
CURES = {"0.10.2": "--xla_cpu_experimental_ynn_fusion_type=-reduce"}
# Variables that a TPU's machine or its job manager sets; JAX sets others itself.
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT")
_GOOGLE = "0x1ae0"  # as vendor of a PCI device
_OTHERS = {  # plugins of accelerators beside a TPU: their name for JAX, and files of their drivers
    "jax_plugins.xla_cuda": ("cuda", ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")),
    "jax_plugins.xla_rocm": ("rocm", ("/dev/kfd", "/dev/dxg")),
}


def prepare() -> None:
    """Set XLA_FLAGS and JAX_PLATFORMS for this process and its children; the user's are kept."""
    flags = with_cure(os.environ.get("XLA_FLAGS", ""), _version("jaxlib"))
    if flags:
        os.environ["XLA_FLAGS"] = flags
    if not os.environ.get("JAX_PLATFORMS") and (found := platforms()):
        os.environ["JAX_PLATFORMS"] = found
        if "jax" in sys.modules:  # which has read the variable
            sys.modules["jax"].config.update("jax_platforms", found)


def with_cure(flags: str, jaxlib: str) -> str:
    """The value of XLA_FLAGS with what this jaxlib needs; a setting of the same flag wins.

    A value that does not begin with a dash names a file of flags; its content takes its place.
    """
    cure = CURES.get(jaxlib, "")
    if not cure:
        return flags
    if flags.strip() and not flags.lstrip().startswith("-"):
        file = Path(flags)
        flags = " ".join(file.read_text().split()) if file.is_file() else ""
    if re.search(rf"{re.escape(cure.partition('=')[0])}(?![\w])", flags):
        return flags
    return f"{flags} {cure}".strip()


def platforms() -> str:
    """What JAX_PLATFORMS must say so that no TPU is asked that is not there; "": leave it to JAX.

    libtpu may be installed to compile for TPUs alone. JAX would then try to start one, which takes
    a minute and prints the runtime's complaints.
    """
    library = os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")
    if not library or has_tpu():
        return ""
    found = []
    for plugin in _plugins():
        name, drivers = next((v for k, v in _OTHERS.items() if plugin.startswith(k)), ("", ()))
        if not name:  # of a kind that JAX alone can judge
            return ""
        found += [name] if any(map(os.path.exists, drivers)) else []
    return ",".join(dict.fromkeys([*found, "cpu"]))


def has_tpu(root: str = "/", environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine shows a TPU: its device files, or what its job manager sets.

    TPUs appear as /dev/accel0, newer ones as groups of /dev/vfio beside a PCI device of Google's:
    other devices that are lent to virtual machines appear there too.
    """
    if any(environment.get(name) for name in _TPU_VARIABLES):
        return True
    if glob.glob(f"{root}dev/accel[0-9]*"):
        return True
    if not glob.glob(f"{root}dev/vfio/[0-9]*"):
        return False
    vendors = map(Path, glob.glob(f"{root}sys/bus/pci/devices/*/vendor"))
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def _plugins() -> list[str]:
    """Modules that JAX will load as plugins, TPU's own left out."""
    names = [point.value for point in importlib.metadata.entry_points(group="jax_plugins")]
    package = importlib.util.find_spec("jax_plugins")
    for folder in (package.submodule_search_locations or ()) if package else ():
        names += [f"jax_plugins.{path.name}" for path in Path(folder).iterdir() if path.is_dir()]
    return [name for name in names if not name.endswith("__pycache__") and "libtpu" not in name]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
