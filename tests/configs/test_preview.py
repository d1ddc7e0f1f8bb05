"""The preview says what the real read would say, without JAX, and leaves nothing behind."""

import json
import subprocess
import sys
import types

import pytest

from configs import preview, schema
from tests.configs.shipped import FILES, ROOT, read


def python(code: str, *argv: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter at the repository's root, begun as programs begin."""
    begun = f"from parallel import launch; launch.prepare()\n{code}"
    command = [sys.executable, "-c", begun, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_previewed_trees_equal_the_real_ones():
    code = (
        "import json, sys; from configs import loading, preview, schema\n"
        "with preview.stand_ins(): trees = [loading.load(file) for file in sys.argv[1:]]\n"
        "heavy = {'jax', 'flax', 'numpy', 'models', 'kernels', 'parallel.sharding'}\n"
        "left = heavy & {*sys.modules}\n"
        "print(json.dumps([sorted(left), [schema.to_dict(tree) for tree in trees]]))"
    )
    done = python(code, *FILES)
    assert done.returncode == 0, done.stderr
    left, previewed = json.loads(done.stdout)
    real = [json.loads(json.dumps(schema.to_dict(read(f"--config={file}")))) for file in FILES]
    assert left == [] and previewed == real


@pytest.mark.parametrize(
    "wrong", ["config.model.widht=4", "config.steps=0", "config.optimizer.rule=adam", "wrokdir=x"]
)
def test_refusals_do_not_load_jax(wrong):
    code = (
        "import sys; from configs import loading\n"
        "try: loading.parse(sys.argv[1:], {'workdir': ''})\n"
        "except loading.UsageError as error: print('jax' in sys.modules, error)"
    )
    done = python(code, f"--config={FILES[0]}", f"--{wrong}")
    assert done.stdout.startswith("False ") and done.stderr == ""


def test_after_a_preview_the_real_modules_load():
    code = (
        "import sys; from configs import loading\n"
        "from pathlib import Path\n"
        "tree = loading.parse([f'--config={sys.argv[1]}'], {})[0][0]\n"
        "import configs, jax, models.lm\n"
        "from configs.lm import gla\n"
        "assert isinstance(tree.model, models.lm.Config) and models.lm.jax is jax\n"
        "assert gla.lm is models.lm and jax.numpy.ones(2).sum() == 2\n"
        "print('fine')"
    )
    done = python(code, FILES[0])
    assert done.stdout == "fine\n", done.stderr


def test_a_file_that_decides_on_jax_is_read_for_real(tmp_path):
    file = tmp_path / "decides.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "from configs.schema import Experiment\n"
        "from models import lm\n\n\n"
        "def get_config():\n"
        "    try:\n"
        "        wide = jnp.finfo(jnp.float32).bits == 32\n"
        "    except Exception:\n"
        "        wide = False\n"
        "    return Experiment(model=lm.Config(width=32 if wide else 8))\n"
    )
    code = (
        "import sys; from configs import loading\n"
        "try: print(loading.parse(sys.argv[1:], {})[0][0].model.width, 'jax' in sys.modules)\n"
        "except loading.UsageError as error: print(error)"
    )
    assert python(code, f"--config={file}").stdout == "32 True\n"
    refused = python(code, f"--config={file}", "--config.model.widht=4")
    assert refused.stdout.startswith("unknown key 'model.widht' (did you mean 'model.width'?)")


def test_values_of_jax_in_a_config_do_not_load_it(tmp_path):
    file = tmp_path / "dtype.py"
    file.write_text(
        "import dataclasses\n"
        "import jax.numpy as jnp\n"
        "from configs.schema import Experiment\n\n\n"
        "@dataclasses.dataclass\n"
        "class Model:\n"
        "    width: int = 4\n"
        "    dtype: jnp.dtype = jnp.bfloat16\n\n\n"
        "def get_config():\n"
        "    return Experiment(model=Model())\n"
    )
    code = (
        "import sys; from configs import loading\n"
        "try: print(loading.parse(sys.argv[1:], {})[0][0].model.dtype(2))\n"
        "except loading.UsageError as error: print('jax' in sys.modules, error)"
    )
    late = python(code, f"--config={file}", "--config.model.width=8", "--config.steps=0")
    assert late.stdout == "False steps=0 must be at least 1.\n"
    kind = python(code, f"--config={file}", "--config.model.dtype=float32")
    assert kind.stdout.startswith("False model.dtype='float32': this key is set in the config file")
    assert python(code, f"--config={file}", "--config.model.width=8").stdout == "2\n"


def test_stand_ins_are_inert():
    with preview.stand_ins():
        import heavy_thing.part as part  # type: ignore
        from heavy_thing import Array, decorate  # type: ignore
        from heavy_thing.other.deep import Base  # type: ignore

        class Derived(part.Module, Base):
            @decorate(static=0)
            def run(self, x: Array[int, "B T"] | None) -> "Array":
                return x

        assert Derived.__mro__ == (Derived, object)
        assert isinstance(-(2 * part.pi) + part.sqrt(2) / 3, preview.Inert)
        assert isinstance(None | Array, preview.Inert)
        assert len({part.float32: 1, part.float16: 2}) == 2
        for decide in (
            bool,
            len,
            iter,
            int,
            float,
            str,
            "{}".format,
            lambda x: x == 1,
            lambda x: x < 1,
        ):
            with pytest.raises(preview.NeedsReal):
                decide(part.devices())
    assert not [name for name in sys.modules if name.startswith("heavy_thing")]
    assert preview.Finder not in [type(finder) for finder in sys.meta_path]


def test_stand_ins_clean_up_after_an_error(monkeypatch):
    home = types.ModuleType("configs.fake_home")
    monkeypatch.setitem(sys.modules, "configs.fake_home", home)
    with pytest.raises(ZeroDivisionError), preview.stand_ins():
        import heavy_thing  # type: ignore  # noqa: F401

        raise ZeroDivisionError
    assert "heavy_thing" not in sys.modules and sys.modules["configs.fake_home"] is home
