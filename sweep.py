"""Train one experiment in many forms and compare them: python sweep.py --config=FILE --study=NAME

    python sweep.py --config=configs/quickstart.py --study=rates --seeds=3 \\
        --sweep.model.pattern='gla,mamba2,(gla*3,attention)' \\
        --sweep.optimizer.learning_rate=1e-3,3e-3 --tune=optimizer.learning_rate

A config file with a `get_sweep` needs no --sweep. The same command goes on after any interruption,
beside other workers too: start it as often as there are devices, or with --workers. docs/sweep.md.
Exit codes: 0 done, 1 some trials failed, 2 bad configuration, 3 stopped by a signal.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from configs import loading
from parallel import launch

OPTIONS = {
    "sweep": "",  # .KEY=A,B,C: an axis, a key of the config with its values; as many as you like
    "study": "",  # its name, under which it goes on; "": the config file's
    "storage": "",  # sqlite:///FILE or postgresql+psycopg://...; "": SQLite in workdir
    "workdir": "",  # a folder for all its runs and its pages; "": runs/STUDY
    "seeds": 0,  # trials of each point, which differ in `seed` and `data.seed`; 0: the file's, or 1
    "tune": "",  # axes by commas: a comparison takes the best value of them for each other point
    "workers": 1,  # processes on this machine; 0: be one more worker, and print no table
    "halving": 0,  # N: of the tuned values the best 1/N go on at 1, N, N^2 ... validations; 0: all
    "heartbeat": 15,  # seconds between two signs of life; after three without any a worker is dead
    "dry_run": False,  # print the points and stop
    "show": False,  # print the comparison as it stands and stop
    "compile_cache": True,  # keep compiled programs in the user's cache folder, and read them
    "debug": False,  # show tracebacks of configuration errors
}
AXIS = "--sweep."
POLL_S = 0.2
REPLACED = 5  # workers that are started again, for each that was asked for


def main() -> int:
    """Read the command line, run what is left of the sweep, and compare."""
    launch.prepare()
    axes, argv = split(sys.argv[1:])
    (base,), options = loading.parse(argv, OPTIONS, single=True)
    file = options["config"][0]
    from configs import sweep as sweeps

    with loading.configuration():
        check(options)
        sweep = loading.sweep(file, base) or sweeps.Sweep(base, {})
        sweep.axes = {**sweep.axes, **sweeps.parse(axes)}
        sweep.seeds = options["seeds"] or sweep.seeds
        sweep.tuned = (*sweep.tuned, *filter(None, options["tune"].split(",")))
        points = sweeps.points(sweep)
    if options["dry_run"]:
        print("\n".join(f"{i}/{len(points)} {point}" for i, point in enumerate(points, 1)))
        return 0
    name = options["study"] or Path(file.partition(":")[0]).stem
    root = Path(options["workdir"] or f"runs/{name}")
    from science import page, study, table
    from training import guards

    with loading.configuration():
        metric = one_metric(points)
        guards.preflight(root)
        storage = options["storage"] or study.default_storage(root)
        pruner = halving(options["halving"], sweep)
        found = study.opened(name, storage, options["heartbeat"], metric.higher, pruner)
    done = True
    if not options["show"]:
        done = run(found, points, root, sweep.tuned, options)
    if options["workers"] == 0:
        return 0 if done else 3
    rows = table.entries(found, points, sweep.tuned, metric.higher)
    table.show(rows, metric.title)
    print(page.write(root, rows, f"Sweep {name}", metric.title, sweep.tuned))
    if not done:
        print("stopped and saved; the same command goes on from there.")
        return 3
    return int(any(lack.startswith("failed") for row in rows for lack in row.lacks))


def split(argv: list[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """The axes of a command line as (KEY, text), and the rest of it."""
    axes, rest = [], []
    for word in argv:
        if word.startswith(AXIS):
            key, equals, text = word.removeprefix(AXIS).partition("=")
            axes.append((key, text if equals else None))
        else:
            rest.append(word)
    return axes, rest


def check(options: dict) -> None:
    """ValueError for an axis without a key, and for numbers that mean nothing."""
    if options["sweep"]:
        raise ValueError(f"--sweep={options['sweep']} has no key: --sweep.KEY=A,B")
    for name, least in {"workers": 0, "seeds": 0, "heartbeat": 1}.items():
        if options[name] < least:
            raise ValueError(f"--{name}={options[name]} must be at least {least}.")


def one_metric(points):
    """What all points are judged by; ValueError where that is not one thing."""
    from training import metrics

    found = {metrics.of(point.experiment.data) for point in points}
    if len(found) > 1:
        titles = " and ".join(sorted(metric.title for metric in found))
        raise ValueError(f"the points are judged by {titles}: sweep over them apart.")
    return found.pop()


def halving(rate: int, sweep):
    """The rule by which trials are stopped early, if any."""
    from science import study

    if not rate:
        return None
    every = sweep.base.evaluation.every_steps
    if rate < 2 or not sweep.tuned or not every:
        raise ValueError(
            f"--halving={rate} must be 0 or at least 2, with --tune to say what competes and with "
            f"evaluation.every_steps={every} above 0."
        )
    return study.Halving(every, rate)


def run(found, points, root: Path, tuned, options: dict) -> bool:
    """Run what is left, in this process or in several; False if a signal ended it."""
    from parallel import compile_cache, host
    from science import worker

    if options["workers"] > 1:
        return spawn(options["workers"])
    host.keep_memory()
    compile_cache.use(options["compile_cache"])
    say = lambda line: print(line, flush=True)
    patience = options["heartbeat"]
    return worker.work(found, points, root, tuned=tuned, say=say, patience_s=patience)


def spawn(count: int) -> bool:
    """Run so many workers, and another for each that dies; False if a signal ended them."""
    command = [sys.executable, *sys.argv, "--workers=0"]  # the last of two options counts
    start = lambda: subprocess.Popen(command, start_new_session=True)
    workers, stopped, replaced = [start() for _ in range(count)], False, 0

    def stop(number, _):
        nonlocal stopped
        stopped = True
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while workers:
        time.sleep(POLL_S)
        for worker in [worker for worker in workers if worker.poll() is not None]:
            workers.remove(worker)
            died = worker.returncode not in (0, 3) and not stopped
            if died and replaced < REPLACED * count:
                replaced += 1
                print(f"a worker died ({worker.returncode}); another takes its place.", flush=True)
                workers.append(start())
    return not stopped


if __name__ == "__main__":
    loading.run(main)
