"""Every test runs on eight virtual CPU devices, with array shapes checked at run time.

Most of the time goes into compiling programs that run once. So XLA leaves out its slower
optimisations, and where jaxlib still has the older emitters of fusions, they replace the newer,
of whose time they take a fifth; the numbers are as good. With XLA_FLAGS set, even to nothing, it
compiles as for users. `launch` adds what makes a version of jaxlib count right.
"""

import importlib.metadata
import itertools
import os
from pathlib import Path

from parallel import launch

GIVEN = "XLA_FLAGS" in os.environ
launch.prepare()

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Tests run beside each other, so that code is not generated in several threads, at a cost for each.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones abort at the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
KERNELS = Path(__file__).parents[1] / "kernels"
# Linux ends a process that maps more than 65,530 areas; a compiled program keeps several.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 30_000
ENDED = itertools.count()  # tests of this process


def checked_modules() -> list[str]:
    """Modules whose jaxtyping annotations are enforced: models, and kernels but for the api files.

    An api.py checks its arguments itself and says in one line what is wrong; the tests of those
    lines need the call to reach them.
    """
    files = [path for path in KERNELS.rglob("*.py") if path.stem not in ("api", "__init__")]
    names = [".".join(path.relative_to(KERNELS.parent).with_suffix("").parts) for path in files]
    return ["models", *sorted(names)]


jaxtyping.install_import_hook(checked_modules(), "beartype.beartype")


def pytest_addoption(parser):
    """--page=NAME writes docs/NAME.md from what the tests see (tests/pages.py)."""
    parser.addoption("--page", default="", help="write docs/PAGE.md: conformance or zoo")


def pytest_configure(config):
    """The page is written by the process that hears of all tests; training takes one device."""
    if config.option.markexpr == "zoo":
        jax.config.update("jax_num_cpu_devices", 1)
    elif config.option.markexpr != "aot" and not GIVEN:  # aot compiles as for users
        os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
    if config.getoption("--page") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(recorder(config.getoption("--page")))


def recorder(page: str):
    """The plugin that writes `page`; ValueError for a page that no test writes."""
    from tests import pages, test_contract, test_zoo

    makers = {"conformance": test_contract, "zoo": test_zoo}
    if page not in makers:
        raise ValueError(f"--page={page}: tests write {' and '.join(makers)}.")
    return pages.Recorder(page, *makers[page].page())


def pytest_ignore_collect(collection_path, config):
    """tests/peers needs torch: only `-m peers` reads it."""
    return True if collection_path.name == "peers" and config.option.markexpr != "peers" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file stay in one worker: what one of them compiled serves the others.

    The contract, whose groups are small, comes last: it leaves no worker alone at the end.
    """
    for item in items:
        if not any(item.iter_markers("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.path.stem == "test_contract")


@pytest.fixture(autouse=True)
def programs_are_dropped():
    """Forgets compiled programs before they fill the address space and the process dies."""
    yield
    # The list takes 20 ms to read when it is long, as long as many a test.
    if next(ENDED) % 16 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def programs_are_kept(tmp_path_factory):
    """What a test of the module compiled, the next ones read."""
    keep_programs(str(tmp_path_factory.getbasetemp() / "programs"), 0.1)
    yield
    keep_programs(None, 1.0)


def keep_programs(folder, seconds):
    """Put programs that take so long to compile into a folder; None: nowhere."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()
