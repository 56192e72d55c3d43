"""Long language runs, as small as they must be: the paper's at its own settings, and what the paper leaves out.

    python -m tools.paper.long_runs --output runs/long --records DIR --wikitext wiki.test.tokens
    python -m tools.paper.long_runs --output runs/long --records DIR --list

A run of --study paper is 50,000 steps of launch/launch.py with the recipes gpt2_small or bert_small and lion_paper,
sgd_paper or sgd_paper_no_momentum. Only size, sequence length, batch, text and precision differ from the recipes. The
same command resumes what is not finished. Two or more of it may run at a time: each takes another run. SIGTERM ends it
after the current step is saved. A finished run leaves a record of a few kB in --records.

The other studies: search (the best rate of Lion, SGD and AdamW on 5,000 steps), tuned (50,000 steps at those rates) and
sizes (r against d at those rates).
"""

import argparse
import contextlib
import fcntl
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_lion.config import LionError
from megatron_lion.run import readable_errors
from tools.corpus.shards import write_json
from tools.paper.studies import frequencies, long_records, long_runs, long_text, plans, run_settings
from tools.paper.studies.long_runs import LongRun


@contextlib.contextmanager
def claimed(run: LongRun) -> Iterator[bool]:
    """Whether this process has the run, which no other process then has until the block is left."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "study.lock").open("w") as lock:  # launch.py has its own, named lock, while it trains
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def record_of(run: LongRun, records: Path) -> Path:
    """The file of a finished run's record."""
    return records / f"{run.name}.json"


def state(run: LongRun, records: Path) -> str:
    """How far a run is, in words."""
    if record_of(run, records).is_file():
        return "finished"
    step = run.last_step
    return "trained, not measured" if step == run.steps else f"step {step:,}" if step else "not started"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for text, runs and checkpoints")
    add("--records", type=Path, metavar="DIR", help="folder for the finished runs' records (default: OUTPUT/records)")
    add("--wikitext", type=Path, metavar="FILE", help="WikiText's test tokens, for table A1")
    add("--study", choices=plans.PLANS, default="paper", help="which runs (default: %(default)s)")
    add("--models", nargs="+", choices=long_text.KINDS, default=["gpt"], help="families (default: gpt)")
    add("--only", nargs="+", metavar="NAME", help="names of runs, as --list shows them (default: all)")
    add("--minutes", type=int, default=50, metavar="N", help="longest piece of a training (default: %(default)s)")
    add("--list", action="store_true", help="show the runs and how far they are; start nothing")
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.records = (options.records or options.output / "records").resolve()
    if not options.list and options.wikitext and not options.wikitext.is_file():
        raise LionError(f"--wikitext {options.wikitext} does not exist: set the file of WikiText's test tokens")
    return options


def main() -> None:
    """Make or list the runs."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command resumes"))  # ends a measurement
    folder = options.output / "text"
    prepare = long_text.paths if options.list else long_text.build
    texts = {name: prepare(folder, name) for name in options.models}
    for run in planned(options, texts):
        if options.list:
            print(f"{run.name:32} {state(run, options.records)}")
        else:
            make(run, options)
    if options.list and "gpt" in texts and (texts["gpt"].folder / "complete").is_file():
        print(f"token-frequency baseline, loss on the fixed split: {frequencies.frequency_loss(texts['gpt']):.3f}")


def planned(options: argparse.Namespace, texts: dict[str, long_text.LongText]) -> Iterator[LongRun]:
    """The runs of the study that the command line names, with those that the search adds when it has results."""
    seen: set[str] = set()
    while True:
        every = plans.PLANS[options.study](options.output, texts, long_records.read(options.records))
        new = [run for run in every if run.name not in seen and run.name in (options.only or [run.name])]
        if not new:
            return
        seen |= {run.name for run in new}
        yield from new


def make(run: LongRun, options: argparse.Namespace) -> None:
    """Train and measure ``run`` and write its record, unless another process has it or it is finished."""
    with claimed(run) as is_ours:
        if not is_ours:
            return
        if (finished := record_of(run, options.records)).is_file():
            run_settings.check_record(finished, run.settings())
            return
        print(f"{run.name}: {state(run, options.records)}", flush=True)
        long_runs.train(run, options.minutes)
        evaluated = {"held-out": run.text.held_out}
        evaluated |= {"wikitext": options.wikitext.resolve()} if options.wikitext else {}
        long_runs.measure(run, evaluated)
        options.records.mkdir(parents=True, exist_ok=True)
        write_json(finished, long_records.record(run))
        print(f"{run.name}: finished, {finished}", flush=True)


if __name__ == "__main__":
    with readable_errors():
        main()
