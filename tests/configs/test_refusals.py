"""Wrong values, pairs, keys and files: one line with the key, the value and what is allowed."""

import pytest

from configs import checks, overrides, schema
from data import sources
from tests.configs.shipped import read, refusal

WRONG = [
    ("steps=abc", "steps='abc' is not an int."),
    ("steps=", "steps='' is not an int."),
    ("steps=1e3", "steps=1e3 is not an int. Use 1000."),
    ("steps=10.5", "steps=10.5 is not an int. Use 10 or 11."),
    ("steps=nan", "steps=nan is not an int."),
    ("steps=true", "steps='true' is not an int."),
    ("steps=0", "steps=0 must be at least 1."),
    ("steps=-5", "steps=-5 must be at least 1."),
    ("seed=-1", "seed=-1 must be at least 0 and at most 4294967295."),
    ("seed=4294967296", "seed=4294967296 must be at least 0 and at most 4294967295."),
    ("log_every=0", "log_every=0 must be at least 1."),
    ("carry_state=maybe", "carry_state='maybe' is not a bool. Use true or false."),
    ("carry_state=true", "carry_state=True needs data.layout='stream', not 'windows'"),
    ("data.length=1", "data.length=1 must be at least 2."),
    ("data.batch=0", "data.batch=0 must be at least 1."),
    ("data.batch=1,2", "data.batch='1,2' is not an int."),
    ("data.seed=-1", "data.seed=-1 must be at least 0"),
    (
        "data.layout=window",
        "data.layout='window' must be one of windows, packed, stream (did you mean 'windows'?).",
    ),
    ("data.layout=xyz", "data.layout='xyz' must be one of windows, packed, stream (did you mean"),
    (
        "data.source=stdlb",
        f"data.source='stdlb' must be one of {', '.join(sources.forms())} (did you mean "
        "'stdlib'?).",
    ),
    ("data.source=text", "data.source='text' must be one of"),
    ("data.source=text:", "(did you mean 'text:FOLDER'?)"),
    ("data.source=stdlib:x", "data.source='stdlib:x' must be one of"),
    ("data.tokenizer=byte", "data.tokenizer='byte' must be one of bytes, bpe:FILE (did you mean"),
    ("data.tokenizer=bpe", "(did you mean 'bpe:FILE'?)"),
    (
        "optimizer.rule=adam",
        "optimizer.rule='adam' must be one of adafactor, adamw, lion, muon, schedule_free, soap "
        "(did you mean 'adamw'?).",
    ),
    ("optimizer.learning_rate=0", "optimizer.learning_rate=0.0 must be greater than 0."),
    ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate=-0.001 must be greater than 0."),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate=inf is not a number. Use a finite"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan is not a number. Use a finite"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' is not a number."),
    ("optimizer.schedule=cosin", "must be one of cosine, wsd, constant (did you mean 'cosine'?)."),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1 must be at least 0."),
    (
        "optimizer.warmup_steps=1001",
        "optimizer.warmup_steps=1001 is more than steps=1000. Use 0",
    ),
    (
        "optimizer.decay_fraction=1.5",
        "optimizer.decay_fraction=1.5 must be at least 0 and at most 1",
    ),
    (
        "optimizer.final_fraction=0",
        "optimizer.final_fraction=0.0 must be greater than 0 and at most",
    ),
    (
        "optimizer.final_fraction=2",
        "optimizer.final_fraction=2.0 must be greater than 0 and at most",
    ),
    ("optimizer.rule.b1=1", "optimizer.rule.b1=1.0 must be at least 0 and less than 1."),
    ("optimizer.b2=-0.1", "optimizer.rule.b2=-0.1 must be at least 0 and less than 1."),
    ("optimizer.eps=0", "optimizer.rule.eps=0.0 must be greater than 0."),
    ("optimizer.ema=1", "optimizer.ema=1.0 must be at least 0 and less than 1."),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1 must be at least 0."),
    ("optimizer.clip_norm=-1", "optimizer.clip_norm=-1.0 must be at least 0."),
    ("optimizer.accumulation=0", "optimizer.accumulation=0 must be at least 1."),
    (
        "optimizer.accumulation=5",
        "optimizer.accumulation=5 does not divide data.batch=16. Use 4, or data.batch=20.",
    ),
    ("mesh.data=0", "mesh.data=0 must be at least 1, or -1 to take the devices left over."),
    ("mesh.tensor=-2", "mesh.tensor=-2 must be at least -1."),
    ("mesh.fsdp=-1", "mesh.data=-1 and mesh.fsdp=-1: only one mesh axis may be -1"),
    ("checkpoint.every_steps=-1", "checkpoint.every_steps=-1 must be at least 0."),
    ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1."),
    ("checkpoint.keep_best=-1", "checkpoint.keep_best=-1 must be at least 0."),
    ("evaluation.every_steps=-1", "evaluation.every_steps=-1 must be at least 0."),
    ("evaluation.batches=0", "evaluation.batches=0 must be at least 1."),
    ("evaluation.sample_tokens=-1", "evaluation.sample_tokens=-1 must be at least 0."),
    ("evaluation.temperature=-0.5", "evaluation.temperature=-0.5 must be at least 0."),
    ("guards.max_bad_steps=0", "guards.max_bad_steps=0 must be at least 1."),
    ("guards.hang_timeout_s=-1", "guards.hang_timeout_s=-1.0 must be at least 0."),
    ("model=4", "model=4 sets a whole section; set one of its keys: width, scale, fast, name"),
    ("data=stdlib", "data='stdlib' sets a whole section; set one of its keys: source, tokenizer"),
    (
        "model.pattern=1,2",
        "model.pattern='1,2' sets a whole section; set one of its keys: [0], [1]",
    ),
    ("model.pattern[1]=8", "model.pattern[1]=8 sets a whole section; set one of its keys: heads"),
    ("model.width=abc", "model.width='abc' is not an int."),
    ("model.width=" + "9" * 5000, "model.width='999"),
    ("model.kind=gren", "model.kind='gren' must be one of red, green (did you mean 'green'?)."),
    ("model.pair=1,2,3", "model.pair='1,2,3' has 3 values; it takes 2."),
    ("model.pair=1,x", "model.pair='x' is not an int."),
    ("model.sizes=1,x", "model.sizes='x' is not an int."),
    ("model.part.rates=1,nan", "model.part.rates=nan is not a number."),
    ("model.sizes[2]=3", "unknown key 'model.sizes[2]'. Keys there: [0], [1]."),
    ("model.limit=none", "model.limit='none' is not an int."),
    (
        "model.function=print",
        "model.function='print': this key is set in the config file, not by a",
    ),
    ("model.grid=1,2", "model.grid=1: this key is set in the config file, not by a flag."),
    ("model.grid[0]=1", "model.grid[0]=1: this key is set in the config file, not by a flag."),
    ("model.grid[0][1]=1", "model.grid[0][1]=1: this key is set in the config file, not by a"),
    ("steps", "steps needs a value: steps=..."),
    ("model.sizes", "model.sizes needs a value: model.sizes=..."),
    ("model.fast=2", "model.fast=2 is not a bool. Use true or false."),
]
UNKNOWN = [
    ("model.widht=4", "(did you mean 'model.width'?). Keys there: width, scale, fast, name, kind"),
    ("modle.width=4", "(did you mean 'model.width'?). Keys there: model, steps, seed"),
    ("modle=4", "(did you mean 'model'?)"),
    ("width=4", "(did you mean 'model.width'?)"),
    ("model.batch=4", "(did you mean 'data.batch'?)"),
    ("optimizer.warmup=4", "(did you mean 'optimizer.warmup_steps'?)"),
    (
        "model.pattern[3].heads=4",
        "(did you mean 'model.pattern[0].heads'?). Keys there: [0], [1], [2].",
    ),
    ("model.pattern.heads=4", "(did you mean 'model.pattern[0].heads'?). Keys there: [0], [1]"),
    (
        "model.pattern.0.heads=4",
        "unknown key 'model.pattern.0.heads' (did you mean 'model.pattern[0]",
    ),
    (
        "model.pattern[0].head=4",
        "(did you mean 'model.pattern[0].heads'?). Keys there: heads, rates.",
    ),
    ("steps.x=4", "unknown key 'steps.x': steps is 1000 and holds no keys."),
    ("model..width=4", "unknown key 'model..width' (did you mean 'model.width'?)"),
    ("=4", "unknown key ''"),
    ("qqqq=4", "unknown key 'qqqq'. Keys there: model, steps"),
    ("a\nb=4", "unknown key 'a\\nb'"),
]


@pytest.mark.parametrize(("given", "words"), WRONG + UNKNOWN)
def test_a_wrong_override_is_one_line(plain, capsys, given, words):
    assert words in refusal(capsys, f"--config={plain}", f"--config.{given}")


def test_the_table_is_as_long_as_promised():
    assert len({given for given, _ in WRONG}) >= 60


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--config.optimizer.schedule=wsd", "--config.optimizer.warmup_steps=900"],
            "optimizer.warmup_steps=900 and the final decay of 200 steps "
            "(optimizer.decay_fraction=0.2) are more than steps=1000. Use at most 800 warmup",
        ),
        (
            ["--config.optimizer.rule=schedule_free", "--config.optimizer.ema=0.9"],
            "optimizer.ema=0.9 averages weights that schedule_free averages by itself. Use",
        ),
        (["--config.steps=50"], "optimizer.warmup_steps=100 is more than steps=50. Use 0 to 50."),
        (
            ["--config.data.batch=6", "--config.optimizer.accumulation=8"],
            "optimizer.accumulation=8 does not divide data.batch=6. Use 6, or data.batch=8.",
        ),
    ],
)
def test_pairs_that_do_not_fit(plain, capsys, more, words):
    assert words in refusal(capsys, f"--config={plain}", *more)


def test_pairs_that_fit(plain):
    stream = ["--config.carry_state", "--config.data.layout=stream"]
    assert read(f"--config={plain}", *stream).carry_state
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=-1"]
    assert read(f"--config={plain}", *mesh).mesh.fsdp == -1
    assert read(f"--config={plain}", "--config.data.source=text:some:where").data.batch == 16


def test_every_number_of_the_schema_has_a_range():
    tree = schema.Experiment()
    numbers = [
        key for key in overrides.keys(tree) if type(overrides.find(tree, key)[2]) in (int, float)
    ]
    own = {f"optimizer.rule.{n}" for n in checks.RULES if hasattr(tree.optimizer.rule, n)}
    assert sorted({*checks.RANGES, *own}) == sorted(numbers)


def test_the_schema_passes_its_own_checks(plain):
    experiment = schema.Experiment(model=read(f"--config={plain}").model)
    checks.check(experiment)


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("none", "must return an Experiment, not NoneType."),
        ("raise", "ValueError: arg='raise' must be 'none'. Use 'none'."),
        ("bug", "plain.py:37: ZeroDivisionError: division by zero (--debug: traceback)"),
        ("float", "steps=1000.0 is not an int. Use 1000."),
        ("bare", "model=None must be a Config such as models.lm.Config()."),
    ],
)
def test_a_config_file_that_fails(plain, capsys, arg, words):
    assert words in refusal(capsys, f"--config={plain}:{arg}", "--config.data.batch=8")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1", "broken.py has no function get_config()."),
        ("get_config = 3", "has no function get_config()."),
        ("def get_config(:", "broken.py:1: SyntaxError: invalid syntax"),
        (
            "import no_such_thing",
            "broken.py:1: ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("def get_config(a): pass", "needs an argument"),
        ("raise SystemExit(0)", "broken.py:1: SystemExit: 0"),
        (
            "from configs.schema import Experiment\ndef get_config():\n  return Experiment(step=3)",
            "broken.py:3: TypeError: Experiment.__init__() got an unexpected keyword",
        ),
        (
            "from configs.schema import *\ndef get_config():\n"
            "  return Experiment(optimizer=Optimizer(rule='adam'))",
            "optimizer.rule='adam' must be a Config such as training.optimizers.adamw.Config().",
        ),
        (
            "from configs.schema import *\ndef get_config():\n  return Experiment(data=3)",
            "data=3 is not a Data.",
        ),
    ],
)
def test_a_broken_file(tmp_path, capsys, code, words):
    file = tmp_path / "broken.py"
    file.write_text(code)
    assert words in refusal(capsys, f"--config={file}")


def test_an_argument_nobody_takes(tmp_path, capsys):
    file = tmp_path / "deaf.py"
    file.write_text("def get_config(): pass")
    assert "takes no argument; leave :big out" in refusal(capsys, f"--config={file}:big")


@pytest.mark.parametrize("name", ["configs/quickstrat.py", "configs/quickstart", "quickstart.py"])
def test_a_missing_file_names_the_nearest(capsys, name):
    line = refusal(capsys, f"--config={name}")
    assert line == f"no config file {name!r} (did you mean 'configs/quickstart.py'?)."


def test_a_missing_file_names_only_configs(capsys):
    assert "did you mean 'configs/lm/" in refusal(capsys, "--config=configs/loadin.py")


def test_a_folder_is_no_file(capsys):
    assert "no config file 'configs/lm' (did you mean 'configs/lm/" in refusal(
        capsys, "--config=configs/lm"
    )
