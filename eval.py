"""Measure configs with one ruler: python eval.py --config=FILE [--config=FILE ...] [--workdir=DIR]

Several --config give columns side by side, timed in turn. A run's --workdir needs no --config: the
run describes itself. What each row means: docs/measure.md.
python eval.py --compare A.json B.json shows what changed between two reports.
python eval.py --curves RUN [RUN ...] [--out=curves.png] draws their loss curves in one picture.
Exit codes: 0 done, 2 bad configuration, 3 no usable checkpoint in --workdir.
"""

import json
import sys
from pathlib import Path

from configs import loading, schema
from parallel import launch

OPTIONS = {
    "workdir": "",  # a run's folder: its newest checkpoint is validated
    "json": "",  # write the report to this file, as --compare reads it
    "html": "",  # write it as a page with pictures
    "markdown": "",  # write it as a Markdown table
    "csv": "",  # write it as comma-separated values
    "only": "",  # some of the groups of rows, as parameters,speed,energy ("": all)
    "curves": "",  # sizes to measure over, as length:128,256,512;batch:1,2,4
    "match": "",  # size the other configs to the first: parameters, flops, state, memory, dollars
    "sized": "",  # a folder: writes there what --match made of each config, for train.py --config
    "pareto": "",  # names of rows, by commas: rank the configs in them
    "loss": 0.0,  # bits per byte of validation: what it cost the runs of --workdir to reach them
    "seconds": 2.0,  # to spend on each timing; nine calls at least
    "peak_seconds": 90.0,  # limit of the process that measures peak memory; 0: leave it out
    "watts": 0.0,  # power of a device, where no counter measures it (0: the table's)
    "price": 0.0,  # dollars a device-hour (0: the table's)
    "pue": 0.0,  # all energy of the site over that of its computers (0: the average)
    "grid": 0.0,  # gCO2e a kWh (0: the world's average)
    "devices": "",  # a TOML file with devices, prices and powers of your own
    "profile": 0,  # so many operations that take the longest, by module
    "column": -1,  # measure this --config alone, counted from 0
    "compile_cache": True,  # keep compiled programs in the user's cache folder, and read them
    "debug": False,  # show tracebacks of configuration errors
}


def main() -> int:
    """Read the command line, measure, print the table and write the files."""
    launch.prepare()
    if sys.argv[1:2] == ["--compare"]:
        return compare(sys.argv[2:])
    if (drawn := of_curves(sys.argv[1:])) is not None:
        return loss_curves(drawn)
    experiments, options = loading.parse(sys.argv[1:], OPTIONS, otherwise=of_runs)
    from evaluation import groups

    with loading.configuration():
        chosen = groups.choose(options["only"])
        if options["sized"] and not options["match"]:
            raise ValueError("--sized=DIR holds what --match makes of the configs. Give --match.")
    from evaluation import measure, subject
    from parallel import compile_cache, host
    from report import table
    from training import guards

    if chosen != ["peak"]:  # the growth of a process that keeps memory would not show
        host.keep_memory()
    # What compiling takes is part of a peak, so that a peak is always one with compiling.
    compile_cache.use(options["compile_cache"] and chosen != ["peak"])
    try:
        with loading.configuration():
            subjects = subject.choose(experiments, options["config"])
            found = measure.measure(subjects, chosen, options)
    except guards.Stop as stop:
        print(stop, file=sys.stderr)
        return stop.code
    table.show(found)
    write(found, options)
    return 0


def of_runs(options: dict) -> list[str]:
    """The configs that the runs of --workdir have written; their checkpoints know a lost one."""
    folders = [Path(folder) for folder in options["workdir"].split(",") if folder]
    for folder in folders:
        try:
            json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError):
            from training import runs

            with loading.configuration():
                runs.recover(folder)
    return [str(folder / "config.json") for folder in folders]


def compare(files: list[str]) -> int:
    """Print what changed between two reports that --json wrote."""
    from report import compare, report

    with loading.configuration():
        for file in files:
            schema.on_disk(file, "--compare")
        if len(files) != 2:
            raise ValueError(f"--compare takes two reports, not {len(files)}: A.json B.json")
        compare.show(*map(report.read, files))
    return 0


def of_curves(argv: list[str]) -> list[str] | None:
    """What follows --curves, where it draws runs: that of configs is measured over sizes."""
    option, equals, first = (argv or [""])[0].partition("=")
    if option != "--curves" or any(word.startswith(("--config", "--workdir")) for word in argv):
        return None
    return [first] * bool(equals) + argv[1:]


def loss_curves(given: list[str]) -> int:
    """Draw the loss curves of several runs, named by their folders, in one picture."""
    from training import plot

    folders, out, words = [], "curves.png", iter(given)
    for word in words:
        if word.partition("=")[0] == "--out":
            out = word.partition("=")[2] or next(words, "")
        else:
            folders.append(word)
    with loading.configuration():
        for path in (*folders, out):
            schema.on_disk(path, "--curves")
        wrong = [word for word in folders if word.startswith("-") or not word]
        if wrong or not folders or not out:
            raise ValueError(
                f"--curves takes folders of runs and --out=FILE, not {wrong or 'none'}."
            )
        print(plot.loss_curve(folders, out))
    return 0


def write(found, options: dict) -> None:
    """The report in the forms that were asked for."""
    from report import html, table

    if options["json"]:
        found.write(options["json"])
    forms = {"html": html.page, "markdown": table.markdown, "csv": table.comma_separated}
    for name, form in forms.items():
        if options[name]:
            path = Path(options[name])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(form(found))


if __name__ == "__main__":
    loading.run(main)
