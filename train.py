"""Train one experiment: python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The same --workdir resumes. Any field of the config is a flag: --config.model.width=512.
Exit codes: 0 done or saved on SIGTERM/SIGINT, 2 bad configuration, 3 no usable checkpoint,
4 storage, 5 non-finite updates, 6 no progress.
"""

import functools
import sys
import time
from pathlib import Path

from configs import loading
from parallel import launch

OPTIONS = {
    "workdir": "",  # "": runs/NAME, after the config file; of a run's config.json, that run
    "dry_run": False,  # print the plan and stop
    "profile": "",  # A:B writes a trace of steps A to B
    "compile_cache": True,  # keep compiled programs in the user's cache folder, and read them
    "distributed": False,  # be one of several processes, which the job manager names
    "coordinator": "",  # HOST:PORT of process 0, where nothing else names it
    "processes": 0,  # how many there are, with --coordinator
    "process": -1,  # which one this is, counted from 0, with --coordinator
    "debug": False,  # show tracebacks of configuration errors
}


def main() -> int:
    """Read the command line, train, and print what came out."""
    started = time.perf_counter()
    launch.prepare()
    (experiment,), options = loading.parse(sys.argv[1:], OPTIONS, single=True)

    profile = loading.span(options["profile"])
    start(options)
    import jax

    from training import guards, log, loop

    if options["dry_run"]:
        with loading.configuration():
            plan = loop.make_plan(experiment)
        log.print_block(loop.describe(plan, 0, loop.compile_step(plan)))
        return 0
    file = Path(options["config"][0].partition(":")[0])
    default = file.parent if file.suffix == ".json" else Path("runs") / file.stem
    workdir = options["workdir"] or str(default)
    try:
        with loading.configuration():
            result = loop.train(experiment, workdir, profile, started)
    except guards.Stop as stop:
        print(stop, file=sys.stderr)
        return stop.code
    if jax.process_index() == 0:
        conclude(result)
    return 0


def start(options: dict) -> None:
    """What a training process is, before its first array: its memory, its job, its cache."""
    from parallel import compile_cache, host

    host.keep_memory()
    named = [options[name] for name in ("coordinator", "processes", "process")]
    with loading.configuration():
        if options["distributed"] or named != ["", 0, -1]:
            host.join(*named)
    compile_cache.use(options["compile_cache"])


def conclude(result) -> None:
    """Print the score, a sample, what the run took, and where its files are."""
    from training import metrics

    experiment = result.plan.experiment
    if not result.finished:
        print(f"stopped and saved at step {result.step}; the same --workdir goes on from there.")
        return
    metric = metrics.of(experiment.data)
    print(f"\nvalidation {metric.title}: {result.score:.4f}")
    speaks = metric.count is None and experiment.model.objective == "next"
    writes = experiment.evaluation.sample_tokens and speaks
    text, rate = sample(result) if writes else ("", None)
    if text:
        print(f"sample at temperature {experiment.evaluation.temperature}:\n{text}\n")
    show_resources(result, rate)
    print(f"wall time {result.wall_time}")
    for name, path in result.paths.items():
        print(f"{name}: {path}")


def sample(result) -> tuple[str, float]:
    """Text that the model writes after the config's prompt, and tokens written per second."""
    import jax
    import jax.numpy as jnp

    from inference.generate import generate

    settings, tokenizer = result.plan.experiment.evaluation, result.plan.train.tokenizer
    start_of_text = tokenizer.encode(settings.sample_prompt.encode()).tolist()
    prompt = jnp.asarray([[tokenizer.separator, *start_of_text]], jnp.int32)
    write = functools.partial(
        generate,
        result.model,
        prompt,
        settings.sample_tokens,
        key=jax.random.key(result.plan.experiment.seed),
        temperature=settings.temperature,
        vocabulary=tokenizer.vocabulary,
    )
    tokens = jax.device_get(write())[0]  # compiles
    start = time.perf_counter()
    write().block_until_ready()
    seconds = time.perf_counter() - start
    return settings.sample_prompt + tokenizer.decode(tokens), settings.sample_tokens / seconds


def show_resources(result, decode_rate: float | None) -> None:
    """The resource table of the run itself; eval.py measures a config in full."""
    from report import report, table
    from resources import compute, memory, throughput
    from resources.row import Row

    plan, trainer = result.plan, result.plan.trainer
    tokens = plan.experiment.data.batch * plan.experiment.data.length
    executed = compute.executed_flops(trainer.step.trace(trainer.abstract, trainer.batch).jaxpr)
    speed = [
        Row("training", result.tokens_per_second, "tok/s", "measured"),
        Row("executed FLOPs, training", executed.total / tokens, "FLOP/token", "modelled"),
    ]
    if decode_rate is not None:
        speed.append(Row("decoding, batch 1", decode_rate, "tok/s", "measured"))
    sizes = []
    if result.model.causal:
        state = memory.tree_bytes(lambda: result.model.init_state(1, 1024))
        sizes.append(Row("state at 1k tokens", state, "B", "compiled"))
    planned = memory.program_bytes(result.program)
    if planned is not None:
        sizes.append(Row("memory of a training step", planned.peak, "B", "modelled"))
    found = {"compute": speed, "memory": sizes}
    column = report.Column("this run", "", {name: rows for name, rows in found.items() if rows})
    device, versions = throughput.device_name(), report.versions()
    table.show(report.Report([column], device, versions, report.commit()))


if __name__ == "__main__":
    loading.run(main)
