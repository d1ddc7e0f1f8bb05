"""Before JAX starts: the compiler's flags by version, and the platform without a TPU's answer."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from parallel import launch

ROOT = Path(__file__).parents[1]
CURE = "--xla_cpu_experimental_ynn_fusion_type"
# The last of 32,769 squares of 0, 1, 2, ...: 32768^2 = 2^30, which float32 holds exactly.
SUMS = """
import jax, jax.numpy as jnp
numbers = jnp.arange(32769, dtype=jnp.float32)
rows = jnp.stack((numbers, 0 * numbers, 0 * numbers), axis=1)
squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))
print(int(squares(rows)[-1]))
"""
# jax-ml/jax 40412: an axis of size 1 in a reduction of rank 7 ended the process.
RANK_7 = """
import jax, jax.numpy as jnp
ones = jnp.ones((3, 1, 2, 2, 8, 8, 8))
print(int(jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(ones, ones).sum()))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """`code` in a process of its own, with nothing of this one's flags."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("code", "right"), [(SUMS, 2**30), (RANK_7, 3 * 2 * 2 * 8**3)])
def test_sums_are_right_as_programs_start(code, right):
    done = run(f"from parallel import launch\nlaunch.prepare()\n{code}", JAX_PLATFORMS="cpu")
    assert done.returncode == 0 and int(done.stdout) == right, done


def test_sums_are_right_in_the_tests():
    numbers = jnp.arange(32769, dtype=jnp.float32)
    rows = jnp.stack((numbers, 0 * numbers, 0 * numbers), axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))
    assert int(squares(rows)[-1]) == 2**30


def test_every_program_prepares_before_jax():
    """A program's own file calls `prepare` before it or a config imports JAX."""
    programs = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("[a-z]*.py")]
    assert len(programs) >= 4
    for path in [*programs, *ROOT.glob("*/__main__.py")]:
        text = path.read_text("utf-8")
        called = text.index("launch.prepare()")
        for later in ("import jax", "loading.parse(", "parse_args("):
            assert later not in text[:called], f"{path.name}: {later} before launch.prepare()"


@pytest.mark.parametrize(
    ("given", "jaxlib", "right"),
    [
        ("", "0.10.2", f"{CURE}=-reduce"),
        ("--xla_a=1  --xla_b", "0.10.2", f"--xla_a=1  --xla_b {CURE}=-reduce"),
        (f"{CURE}= --xla_a=1", "0.10.2", f"{CURE}= --xla_a=1"),
        (f"{CURE}_else=1", "0.10.2", f"{CURE}_else=1 {CURE}=-reduce"),
        ("", "0.12.0.1", ""),
        ("--xla_a=1", "0.10.1", "--xla_a=1"),
        ("", "", ""),
        ("/no/such/file", "0.10.2", f"{CURE}=-reduce"),
        ("/no/such/file", "0.12.0.1", "/no/such/file"),
    ],
)
def test_flags_are_kept_and_added_to(given, jaxlib, right):
    assert launch.with_cure(given, jaxlib) == right


def test_a_file_of_flags_is_read(tmp_path):
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_b=2\n")
    found = launch.with_cure(str(tmp_path / "flags"), "0.10.2")
    assert found == f"--xla_a=1 --xla_b=2 {CURE}=-reduce"


def test_the_process_gets_the_flags_of_its_jaxlib():
    code = (
        "import os\nfrom parallel import launch\nlaunch.prepare()\nprint(os.environ['XLA_FLAGS'])"
    )
    done = run(code, XLA_FLAGS="--xla_a=1")
    cure = launch.CURES.get(importlib.metadata.version("jaxlib"), "")
    assert done.stdout.strip() == f"--xla_a=1 {cure}".strip()


# A machine's files, and its variables: whether it shows a TPU.
TPUS = [
    ((), {}, False),
    (("dev/accel0",), {}, True),
    (("dev/accel/accel0",), {}, False),  # of the kernel's own subsystem, as Intel's
    (("dev/vfio/vfio",), {}, False),
    (("dev/vfio/0", "sys/bus/pci/devices/0000:00:05.0/vendor"), {}, True),
    (("dev/vfio/0",), {}, False),  # another device, lent to a virtual machine
    ((), {"TPU_WORKER_HOSTNAMES": "10.0.0.2"}, True),
    ((), {"TPU_SKIP_MDS_QUERY": "1", "TPU_ML_PLATFORM": "JAX"}, False),  # set by JAX
]


@pytest.mark.parametrize(("files", "variables", "right"), TPUS)
def test_a_tpu_is_told_by_what_the_machine_shows(tmp_path, files, variables, right):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0x1ae0\n")
    assert launch.has_tpu(f"{tmp_path}/", variables) is right


@pytest.mark.parametrize(
    ("library", "tpu", "plugins", "drivers", "right"),
    [
        (False, False, [], [], ""),
        (True, True, [], [], ""),
        (True, False, [], [], "cpu"),
        (True, False, ["jax_plugins.xla_cuda13"], ["/dev/nvidia0"], "cuda,cpu"),
        (True, False, ["jax_plugins.xla_cuda13"], [], "cpu"),
        (True, False, ["jax_plugins.another"], [], ""),
    ],
)
def test_platforms(monkeypatch, library, tpu, plugins, drivers, right):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: library or None)
    monkeypatch.setattr(launch, "has_tpu", lambda: tpu)
    monkeypatch.setattr(launch, "_plugins", lambda: plugins)
    monkeypatch.setattr(os.path, "exists", lambda path: path in drivers)
    assert launch.platforms() == right


@pytest.mark.parametrize("given", ["", "tpu", "cpu"])
def test_a_platform_that_is_named_stays(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("JAX_PLATFORMS", given)
    monkeypatch.setattr(launch, "platforms", lambda: "cpu")
    launch.prepare()
    assert os.environ["JAX_PLATFORMS"] == (given or "cpu")


@pytest.mark.aot
def test_no_tpu_is_asked_that_is_not_there():
    done = run("from parallel import launch\nlaunch.prepare()\nimport jax\nprint(jax.devices())")
    assert (done.stdout, done.stderr) == ("[CpuDevice(id=0)]\n", "")


@pytest.mark.parametrize(
    ("given", "variables", "words"),
    [
        (("", 0, -1), {}, "there is no job to join (coordinator_address should be"),
        (("host", 2, 0), {}, "the coordinator 'host' must be HOST:PORT"),
        (("host:1", 2, 2), {}, "process 2 of 2 must be 0 to 1."),
        (("host:1", 2, -1), {}, "there is no job to join (The process id"),
        (("", 0, 0), {"JAX_COORDINATOR_ADDRESS": "host:1"}, "(Number of processes"),
        (("", 0, -1), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is no number."),
        (("host:1", 0, -1), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "3"}, "process 3 of 2"),
    ],
)
def test_a_job_must_be_named_in_full(given, variables, words):
    # A process of its own: no job can be joined where JAX has computed something already.
    code = f"from parallel import host\ntry: host.join{given}\nexcept ValueError as e: print(e)"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert words in done.stdout and done.stdout.count("\n") == 1, done.stdout + done.stderr


# Every path that a user gives, one command each.
ADDRESSES = [
    "train.py --config=configs/quickstart.py --workdir=gs://b/r",
    "train.py --config=configs/quickstart.py --config.data.folder=s3://b/r",
    "train.py --config=configs/quickstart.py --config.data.source=text:gs://b/r",
    "train.py --config=configs/quickstart.py --config.data.tokenizer=bpe:https://b/r",
    "train.py --config=gs://b/r.py",
    *(
        f"eval.py --config=configs/quickstart.py --{name}=gs://b/r"
        for name in ("workdir", "json", "html", "markdown", "csv", "devices")
    ),
    "eval.py --compare gs://b/r a.json",
    "eval.py --curves gs://b/r",
    "-m data.tokenizers --out gs://b/r",
    "-m data.tfds_example --folder gs://b/r",
    "-m data.pipeline --source text:gs://b/r",
]


@pytest.mark.parametrize("command", ADDRESSES)
def test_an_address_is_refused_in_one_line(command):
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "is an address, not a path" in line]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (ROOT / "gs:").exists() and not (ROOT / "s3:").exists()


def test_python_is_refused_too(tmp_path):
    from configs.schema import Data
    from data import sources, tokenizers
    from training import guards

    for call in (
        lambda: guards.preflight("gs://b/r"),
        lambda: sources.documents(Data(source="text:gs://b/r")),
        lambda: sources.documents(Data(folder="gs://b/r")),
        lambda: tokenizers.open_tokenizer("bpe:gs://b/r"),
    ):
        with pytest.raises(ValueError, match="is an address, not a path.*such as /mnt/b/r"):
            call()
    guards.preflight(tmp_path / "a:b")
