"""What eval.py makes of its command line before anything is measured."""

import pytest

import eval as program
from configs import loading
from training import plot


@pytest.fixture
def said(monkeypatch):
    """Run eval.py with words of a command line; the user's error in one line, or the exit code."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["eval.py", *words])
        try:
            return program.main()
        except loading.UsageError as error:
            assert "\n" not in str(error)
            return str(error)

    return run


@pytest.mark.parametrize(
    ("words", "folders", "out"),
    [
        (["--curves", "a", "b c"], ["a", "b c"], "curves.png"),
        (["--curves=a", "b", "--out=x.png"], ["a", "b"], "x.png"),
        (["--curves", "a", "--out", "x.png", "b"], ["a", "b"], "x.png"),
    ],
)
def test_curves_of_runs(said, monkeypatch, words, folders, out):
    monkeypatch.setattr(plot, "loss_curve", lambda *given: given == (folders, out) or given)
    seen = []
    monkeypatch.setattr("builtins.print", lambda *what, **_: seen.append(what))
    assert said(*words) == 0 and seen == [(True,)]


@pytest.mark.parametrize("words", [["--curves"], ["--curves="], ["--curves", "a", "--out"]])
def test_curves_of_nothing(said, words):
    assert said(*words).startswith("--curves takes folders of runs and --out=FILE")


def test_sized_needs_match(said):
    found = said("--config=configs/quickstart.py", "--sized=there")
    assert found == "--sized=DIR holds what --match makes of the configs. Give --match."


def test_a_workdir_without_a_run_is_one_line(said, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        found = said(f"--workdir={folder}")
        assert found.startswith(f"workdir={folder} holds no config.json of a run that can be read")
    assert not list(tmp_path.iterdir())
