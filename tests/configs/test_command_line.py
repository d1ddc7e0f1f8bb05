"""What a command line may say: files, overrides, options; what comes back is frozen."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import loading, overrides, schema
from tests.configs.shipped import OPTIONS, read, refusal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        (["--config.steps=7", "--config.optimizer.warmup_steps=0"], "steps", 7),
        (["--config.steps", "700"], "steps", 700),
        (["-config.steps=700"], "steps", 700),
        (["-config.steps", "700"], "steps", 700),
        (["--config.steps=700", "--config.steps=800"], "steps", 800),
        (["--config.mesh.data", "-1"], "mesh.data", -1),
        (["--config.model.width=-3"], "model.width", -3),
        (["--config.optimizer.clip_norm=2"], "optimizer.clip_norm", 2.0),
        (["--config.optimizer.clip_norm=0"], "optimizer.clip_norm", 0.0),
        (["--config.optimizer.rule.eps=1e-6"], "optimizer.rule.eps", 1e-6),
        (["--config.model.scale", "-.5"], "model.scale", -0.5),
        (["--config.model.fast"], "model.fast", True),
        (["--config.model.fast", "--config.steps=700"], "model.fast", True),
        (["--config.model.fast=True"], "model.fast", True),
        (["--config.model.fast", "1"], "model.fast", True),
        (["--config.model.fast=false"], "model.fast", False),
        (["--config.model.name="], "model.name", ""),
        (["--config.model.name", ""], "model.name", ""),
        (["--config.model.name=a=b --c"], "model.name", "a=b --c"),
        (["--config.model.name=a\nb"], "model.name", "a\nb"),
        (["--config.model.kind=green"], "model.kind", "green"),
        (["--config.model.sizes=3,4,5"], "model.sizes", (3, 4, 5)),
        (["--config.model.sizes=(3, 4)"], "model.sizes", (3, 4)),
        (["--config.model.sizes=[3,4]"], "model.sizes", (3, 4)),
        (["--config.model.sizes=3"], "model.sizes", (3,)),
        (["--config.model.sizes=(3,)"], "model.sizes", (3,)),
        (["--config.model.sizes="], "model.sizes", ()),
        (["--config.model.sizes=()"], "model.sizes", ()),
        (["--config.model.sizes[1]=9"], "model.sizes", (1, 9)),
        (["--config.model.sizes[1]=9", "--config.model.sizes[0]=8"], "model.sizes", (8, 9)),
        (["--config.model.pair=5,6"], "model.pair", (5, 6)),
        (["--config.model.words=a,b"], "model.words", ("a", "b")),
        (["--config.model.words=1,2.5"], "model.words", (1, 2.5)),
        (["--config.model.limit=4"], "model.limit", 4),
        (["--config.model.part.rates=1,2"], "model.part.rates", (1.0, 2.0)),
        (["--config.model.part.rates[0]=3"], "model.part.rates", (3.0, 1.0)),
        (["--config.model.pattern[1].heads=8"], "model.pattern[1].heads", 8),
    ],
)
def test_a_field_is_set_and_typed(plain, given, key, value):
    new = overrides.find(read(f"--config={plain}", *given), key)[2]
    assert new == value and type(new) is type(value)
    if isinstance(value, tuple):
        assert [type(one) for one in new] == [type(one) for one in value]


def test_only_the_named_fields_change(plain):
    before, after = read(f"--config={plain}"), read(f"--config={plain}", "--config.data.batch=64")
    old, new = schema.to_dict(before), schema.to_dict(after)
    assert old["data"].pop("batch") == 16 and new["data"].pop("batch") == 64
    assert old == new


def test_the_order_of_file_and_overrides_is_free(plain):
    assert read("--config.steps=700", "--config", plain).steps == 700


def test_equal_sections_are_set_one_by_one(plain):
    pattern = read(f"--config={plain}", "--config.model.pattern[0].heads=8").model.pattern
    assert [part.heads for part in pattern] == [8, 4, 4]


def test_the_file_is_read_anew_each_time(plain):
    read(f"--config={plain}", "--config.model.part.heads=8")
    assert read(f"--config={plain}").model.part.heads == 4


def test_the_argument_after_the_colon_reaches_get_config(plain):
    assert read(f"--config={plain}:a:b c").model.name == "a:b c"
    assert read(f"--config={plain}:").model.name == ""


def test_several_files_take_the_same_overrides(plain, capsys):
    argv = [f"--config={plain}:one", "--config", f"{plain}:two", "--config.steps=700"]
    configs, values = loading.parse(argv, OPTIONS)
    assert [(c.model.name, c.steps) for c in configs] == [("one", 700), ("two", 700)]
    assert values["config"] == [f"{plain}:one", f"{plain}:two"]
    line = refusal(capsys, *argv, "--config.model.hight=1")
    assert line.startswith(f"{plain}:one: unknown key 'model.hight'")


def test_a_single_file_may_be_asked_for(plain):
    with pytest.raises(loading.UsageError, match="given 2 times"):
        loading.parse([f"--config={plain}"] * 2, OPTIONS, single=True)


def test_the_config_is_frozen(plain):
    config = read(f"--config={plain}", "--config.model.sizes=3,4")
    nodes = [config, config.data, config.model, config.model.part, *config.model.pattern]
    for node in nodes:
        name = dataclasses.fields(node)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(node, name, 1)


def test_a_flag_chooses_an_optimizer_by_its_file(plain):
    """Its settings stand in any order, a rule that is there keeps its own, old keys are read."""
    rule = read(f"--config={plain}", "--config.optimizer.rule=lion").optimizer.rule
    assert schema.to_dict(rule)["class"] == "training.optimizers.lion.Config"
    given = ["--config.optimizer.rule.momentum=0.9", "--config.optimizer.rule=muon"]
    assert read(f"--config={plain}", *given).optimizer.rule.momentum == 0.9
    quick = "--config=configs/quickstart.py"
    assert read(quick, "--config.optimizer.rule=muon") == read(quick)
    old = [f"--config.optimizer.{k}" for k in ("eps=1e-6", "b1=0.8", "b2=0.7", "name=muon")]
    rule = read(f"--config={plain}", *old).optimizer.rule
    assert (type(rule).__module__, rule.eps) == ("training.optimizers.muon", 1e-6)
    assert (rule.b1, rule.b2) == (0.8, 0.7)


@pytest.mark.filterwarnings("ignore:the load_module")  # of config_flags itself
def test_values_equal_those_that_config_flags_reads_from_the_file(plain):
    given = ["--config.steps=70", "--config.model.sizes=(3,4)", "--config.model.fast=true"]
    given += ["--config.optimizer.rule.eps", "1e-6", "--config.model.pattern[2].heads=2"]
    argv = ["", f"--config={plain}:word", *given]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    theirs = schema.to_dict(values["config"].value)
    ours = schema.to_dict(
        read(f"--config={plain}:word", *given, "--config.optimizer.warmup_steps=0")
    )
    for tree in (ours, theirs):
        tree["model"]["class"] = tree["optimizer"]["warmup_steps"] = ""
        assert [part.pop("class")[-4:] for part in tree["model"]["pattern"]] == ["Part"] * 3
        tree["model"]["part"].pop("class")
    theirs["model"]["pattern"] = ours["model"]["pattern"]  # theirs sets all three: one object
    assert ours == theirs


def test_options_have_the_type_of_their_default(plain):
    argv = [f"--config={plain}", "--workdir=a b", "--dry_run", "-rounds", "5", "--rate=2"]
    values = loading.parse(argv, OPTIONS)[1]
    values.pop("config")
    expected = {"workdir": "a b", "dry_run": True, "profile": "", "rounds": 5, "rate": 2.0}
    assert values == expected and type(values["rate"]) is float


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--wrokdir=x"],
            "unknown option '--wrokdir' (did you mean '--workdir'?). Options: --config",
        ),
        (["--dry-run"], "(did you mean '--dry_run'?)"),
        (["--confg.steps=3"], "(did you mean '--config.steps'?)"),
        (["--steps=3"], "(did you mean '--config.steps'?)"),
        (["--model.width=3"], "(did you mean '--config.model.width'?)"),
        (["--workdir"], "--workdir needs a value"),
        (["--dry_run=maybe"], "--dry_run='maybe' is not a bool. Use true or false."),
        (["--dry_run", "yes"], "unexpected argument 'yes'"),
        (["--rounds=2.5"], "--rounds=2.5 is not an int. Use 2 or 3."),
        (["--rate=fast"], "--rate='fast' is not a number."),
        (["steps=3"], "unexpected argument 'steps=3'"),
        (["--"], "unexpected argument '--'"),
        (["--config"], "--config needs a file"),
        (["--config="], "--config needs a file"),
    ],
)
def test_wrong_options(plain, capsys, argv, words):
    assert words in refusal(capsys, f"--config={plain}", *argv)


def test_no_config_at_all(capsys):
    assert refusal(capsys, "--workdir=x").startswith("--config is missing")


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpshort"])
def test_help_prints_the_docstring_and_the_options(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Does one thing.")
    with pytest.raises(SystemExit) as stop:
        loading.parse([flag], OPTIONS)
    out = capsys.readouterr().out
    assert not stop.value.code and out.startswith("Does one thing.\n")
    assert "--dry_run=false" in out and "--rounds=3" in out and "--config=FILE[:WORD]" in out
    assert "configs/quickstart.py" in out and "checkpoint.keep=3 " in out
    assert "optimizer.rule=soap" in out and "optimizer.rule.every=10 " in out


@pytest.mark.parametrize("program", ["train.py", "eval.py", "sweep.py"])
def test_help_says_what_every_option_and_field_does(program):
    done = subprocess.run(
        [sys.executable, program, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    options, files, fields = (part.splitlines()[1:] for part in done.stdout.split("\n\n")[-3:])
    for line in (*options, *files, *fields):
        name, _, words = line.strip().partition("  ")
        assert words.strip(), f"--help has no word on {name}"


def test_spans():
    assert loading.span("") is None and loading.span("20:25") == (20, 25)
    for text in ("20", "25:20", "a:b", "1:2:3"):
        with pytest.raises(loading.UsageError, match="FIRST:LAST"):
            loading.span(text)


def test_debug_adds_the_traceback(monkeypatch, capsys):
    def main():
        with loading.configuration():
            raise ValueError("heads=3 does not divide 8.")

    for argv, traceback in (["x"], False), (["x", "--debug"], True):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            loading.run(main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and ("Traceback" in err) is traceback
        assert err.endswith("config error: heads=3 does not divide 8.\n")


def test_run_hands_out_the_exit_code_and_leaves_bugs_alone():
    with pytest.raises(SystemExit) as stop:
        loading.run(lambda: 5)
    assert stop.value.code == 5
    with pytest.raises(ZeroDivisionError):
        loading.run(lambda: 1 // 0)
