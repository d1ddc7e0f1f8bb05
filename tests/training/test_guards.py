"""Guards: signals, hangs, locks and bad folders, in processes of their own where they end one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training import guards

ROOT = Path(__file__).parents[2]


def start(code: str) -> subprocess.Popen:
    """A process that runs `code` with `guards` imported; returned once it printed "ready"."""
    script = f"import sys, time, threading\nfrom training import guards\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


WAITS = """
with guards.GracefulStop() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    {then}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks(number):
    process = start(WAITS.format(then="print('saved')"))
    process.send_signal(number)
    output, error = process.communicate(timeout=30)
    assert process.returncode == 0 and output == "saving\nsaved\n"
    assert error.count("\n") == 1 and error.startswith(f"{number.name}: the run saves and ends")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(second):
    # A minute in C code that lets other threads run but no Python handler: like a compilation.
    hashing = "hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)"
    process = start(WAITS.format(then=f"import hashlib; {hashing}"))
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    time.sleep(2 * guards.GracefulStop.BOUNCE_S)
    sent = time.monotonic()
    process.send_signal(second)
    process.communicate(timeout=30)
    assert process.returncode == 128 + second and time.monotonic() - sent < 5


def test_signals_of_one_instant_count_as_one():
    process = start(WAITS.format(then="time.sleep(0.3); print('saved')"))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "saving\nsaved\n" and process.returncode == 0


def test_handlers_are_put_back_and_other_threads_ignored():
    before = [signal.getsignal(number) for number in guards.GracefulStop.SIGNALS]
    with guards.GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested
    assert [signal.getsignal(number) for number in guards.GracefulStop.SIGNALS] == before
    seen = []

    def elsewhere():
        with guards.GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before[0])]


def test_watchdog_prints_all_stacks_and_exits_6(tmp_path):
    code = f"""
def waits_for_a_device():
    print("ready", flush=True)
    time.sleep(60)

def another_thread():
    time.sleep(60)

threading.Thread(target=another_thread, daemon=True).start()
with guards.Watchdog(0.3, {str(tmp_path)!r}) as watchdog:
    for _ in range(10):
        time.sleep(0.05)
        watchdog.beat()
    waits_for_a_device()
"""
    output, error = (process := start(code)).communicate(timeout=30)
    assert process.returncode == guards.HANG == 6
    for text in (error, (tmp_path / "hang.txt").read_text()):
        assert text.startswith("hang error: no finished step for 0.3 s.")
        assert "in waits_for_a_device" in text and "in another_thread" in text


def test_watchdog_forgives_a_suspended_process(tmp_path):
    code = f"""
with guards.Watchdog(1.0, {str(tmp_path)!r}) as watchdog:
    print("ready", flush=True)
    for _ in range(20):
        time.sleep(0.1)
        watchdog.beat()
"""
    process = start(code)
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0


def test_watchdog_off(tmp_path):
    with guards.Watchdog(0.0, tmp_path) as watchdog:
        assert all(thread.name != "watchdog" for thread in threading.enumerate())
        watchdog.beat()
    with pytest.raises(ValueError, match="guards.hang_timeout_s=-1"):
        guards.Watchdog(-1, tmp_path)


def test_lock_conflict_and_release_by_kill(tmp_path):
    code = f"""
with guards.RunLock({str(tmp_path)!r}):
    print("ready", flush=True)
    time.sleep(60)
"""
    process = start(code)
    with pytest.raises(ValueError, match=f"in use by process {process.pid} ") as caught:
        guards.RunLock(tmp_path).__enter__()
    assert "\n" not in str(caught.value)
    process.kill()
    process.communicate()
    with guards.RunLock(tmp_path):
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())
    with guards.RunLock(tmp_path):
        pass


def test_the_lock_is_the_jobs(tmp_path):
    """Processes of one job enter together; those of another are all told the first one's fault."""
    told = []
    one = [guards.RunLock(tmp_path, first, lambda fault: "") for first in (True, False)]
    code = f"""
from training import guards

def agree(fault):
    print(fault)
    return fault

try:
    with guards.RunLock({str(tmp_path)!r}, True, agree):
        print("in")
except ValueError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    another_job = lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    with one[0], one[1]:  # reading the file here would let go of the lock
        sent, raised = another_job().splitlines()
        assert sent == raised and f"in use by process {os.getpid()} " in sent
        with pytest.raises(ValueError, match="in use") as caught:
            guards.RunLock(tmp_path, False, lambda fault: told.append(fault) or sent).__enter__()
        assert told == [""] and str(caught.value) == sent
    assert another_job() == "\nin\n"


def test_lock_is_not_inherited_by_children(tmp_path):
    code = f"""
import os
with guards.RunLock({str(tmp_path)!r}):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(60)
"""
    process = start(code)
    process.kill()
    process.wait()
    with guards.RunLock(tmp_path):  # the child is still there and must not hold it
        pass
    process.stdout.close()
    process.stderr.close()


def test_bad_steps():
    bad = guards.BadSteps(3)
    for step, finite in enumerate([True, False, False, True, False, False], start=1):
        bad.update(finite, step)
    assert (bad.in_a_row, bad.total) == (2, 4)
    with pytest.raises(guards.NonFinite, match=r"3 step\(s\) in a row \(steps 5-7\)") as caught:
        bad.update(False, 7)
    assert caught.value.code == 5 and "\n" not in str(caught.value)
    with pytest.raises(guards.NonFinite, match=r"\(step 4\)"):
        guards.BadSteps(1).update(False, 4)
    with pytest.raises(ValueError, match="guards.max_bad_steps=0"):
        guards.BadSteps(0)


def test_preflight(tmp_path):
    guards.preflight(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    for workdir, text in (
        (tmp_path / "file", "is a file, or lies under one"),
        (tmp_path / "file" / "run", "is a file, or lies under one"),
        (Path("/proc/1/run"), "is not writable"),
        (tmp_path / ("x" * 300), "is not writable"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            guards.preflight(workdir)
        assert str(workdir) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="GB free, the run needs 1000000000.00 GB"):
        guards.preflight(tmp_path, need_bytes=10**18)
