"""--profile: a trace for every span that the run touches, a refusal for the rest."""

import jax
import pytest

from training.tracing import Trace


@pytest.fixture
def profiler(monkeypatch):
    """What the profiler was asked for: folders, and "stop"."""
    asked = []
    monkeypatch.setattr(jax.profiler, "start_trace", asked.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: asked.append("stop"))
    return asked


def traced(span, folder, done=0, steps=6, ends=None):
    """The steps that a run of `steps` steps does between start and stop of its trace."""
    found = []
    with Trace(span, folder, done, steps) as trace:
        for step in range(done + 1, (ends or steps) + 1):
            trace.before(step)
            if trace._open:
                found.append(step)
            trace.after(step, lambda step=step: found.append(f"waits for {step}"))
    return found


@pytest.mark.parametrize(
    ("span", "done", "ends", "right"),
    [
        ((2, 3), 0, None, [2, 3, "waits for 3"]),
        ((5, 6), 0, None, [5, 6, "waits for 6"]),  # the last step is in the span
        ((0, 2), 0, None, [1, 2, "waits for 2"]),  # steps count from 1
        ((5, 99), 0, None, [5, 6]),
        ((2, 4), 2, None, [3, 4, "waits for 4"]),  # resumed within the span
        ((2, 5), 0, 3, [2, 3]),  # stopped within it
        ((4, 5), 0, 3, []),  # stopped before it
        (None, 0, None, []),
    ],
)
def test_steps_of_a_trace(tmp_path, profiler, span, done, ends, right):
    assert traced(span, tmp_path, done, ends=ends) == right
    assert profiler == ([str(tmp_path / "profile"), "stop"] if right else [])


def test_an_error_within_the_span_leaves_the_trace(tmp_path, profiler):
    with pytest.raises(ZeroDivisionError), Trace((1, 5), tmp_path, 0, 6) as trace:
        trace.before(1)
        raise ZeroDivisionError
    assert profiler[1:] == ["stop"]


@pytest.mark.parametrize(
    ("span", "done", "words"),
    [
        ((8, 9), 0, "--profile=8:9: the run has the steps 1 to 6. Trace some of them, such as"),
        ((0, 0), 0, "--profile=0:0: the run has the steps 1 to 6."),
        ((1, 2), 4, "--profile=1:2: the run has done 4 of 6 steps. Trace a step after 4, or"),
    ],
)
def test_a_span_that_no_step_is_left_of(tmp_path, span, done, words):
    with pytest.raises(ValueError) as caught:
        Trace(span, tmp_path, done, 6)
    assert str(caught.value).startswith(words)


def test_the_command_of_a_traced_run_resumes(tmp_path, profiler):
    (tmp_path / "profile").mkdir()
    assert traced((1, 2), tmp_path, done=4) == [] and profiler == []


def test_a_real_trace(tmp_path):
    with Trace((1, 1), tmp_path, 0, 1) as trace:
        trace.before(1)
        jax.numpy.ones(3).sum().block_until_ready()
        trace.after(1, lambda: None)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
