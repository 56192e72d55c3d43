"""Norm-ratio rounds in Megatron's loop: each measures the mean gradient with the parameters held fixed.

After every N-th iteration, between its log line and its checkpoint, a round runs B other global batches forward and
backward through Megatron's schedule, reduces each batch's gradient as training would, adds it to a mean outside
Megatron's buffers, and records norms, ratio, loss and noise (:mod:`megatron_lion.stats`). The model stays in training
mode, dropout on: it is the gradient of the training loss. Routers' auxiliary losses are part of the gradient but not of
the recorded loss. Training is not changed (:mod:`.isolation`).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_lion.config import ALL_BATCHES, NormRatioOptions
from megatron_lion.integration import compat, console
from megatron_lion.integration.flags import norm_ratio_arguments
from megatron_lion.integration.loop_callbacks import Step
from megatron_lion.integration.reporting import metrics
from megatron_lion.integration.reporting.norm_ratio import round_data
from megatron_lion.integration.reporting.norm_ratio.isolation import isolated
from megatron_lion.integration.reporting.norm_ratio.loop_round import run_round
from megatron_lion.stats import GradientRecord
from megatron_lion.stats.writer import RecordFile

# Name in TensorBoard and Weights & Biases, and key in the record.
METRICS = {
    f"norm-ratio/{key}": key
    for key in ("ratio", "ratio_over_sqrt_d", "l1", "l2", "loss", "snr", "noise_scale", "kkt_residual", "linf_param")
}


class Measure(Protocol):
    """Runs one round after ``iteration`` steps and reports it. ``stepped``: this process has made a step."""

    def __call__(self, options: NormRatioOptions, iteration: int, *, stepped: bool) -> None: ...


class RoundSchedule:
    """When each round of one training is due. Makes the record file ready."""

    def __init__(self, options: NormRatioOptions, measure: Measure) -> None:
        self.options, self.measure = options, measure

    def start(self, iteration: int) -> None:
        """Before the first step, after ``iteration`` earlier ones. Measure if asked for. Issues one broadcast."""
        file, is_new = RecordFile(Path(self.options.file)), [True]
        if torch.distributed.get_rank() == 0:
            if moved := file.resume(iteration):
                console.say(moved)
            is_new = [file.is_empty()]
        torch.distributed.broadcast_object_list(is_new, src=0)
        if self.options.at_start and is_new[0]:
            self.measure(self.options, iteration, stepped=False)

    def after_step(self, iteration: int) -> None:
        """Measure if a round is due after ``iteration`` steps."""
        if self.options.interval and iteration % self.options.interval == 0:
            self.measure(self.options, iteration, stepped=True)


@dataclass
class Rounds:
    """The rounds in Megatron's loop: the data and the step that they need."""

    datasets: list[Any] = field(default_factory=list)
    """this rank's training dataset for each model chunk, of one epoch for rounds over the whole split; empty where
    another rank reads for it"""
    step: Step | None = None
    """the latest step, without its data; None before the first"""
    schedule: RoundSchedule | None = None
    """None before the first step, and without rounds"""

    def before_step(self, step: Step, iteration: int) -> None:
        """Keep ``step``; before the first one start the schedule."""
        from megatron.training import get_args

        # Without the iterator: kept to the end, it keeps the workers that read data, and Python waits for them at exit.
        self.step = replace(step, data_iterator=round_data.form_of(step.data_iterator))
        if self.schedule is None:
            round_data.check_datasets(self.datasets)
            self.schedule = RoundSchedule(norm_ratio_arguments.options_from(get_args()), self.measure)
            self.schedule.start(iteration)

    def measure(self, options: NormRatioOptions, iteration: int, *, stepped: bool) -> None:
        """Run one round and report it."""
        assert self.step is not None
        with (
            _interval_timer_stopped(),
            isolated(self.step.model, self.step.optimizer, self.step.config, stepped=stepped),
        ):
            record, tokens = run_round(self.step, self.datasets, options.batches, iteration)
        report(record, options, iteration, {"tokens": tokens}, metrics.write)


@contextlib.contextmanager
def _interval_timer_stopped() -> Iterator[None]:
    from megatron.training import get_timers

    timer = get_timers()("interval-time", log_level=0)
    timer.stop()
    yield
    timer.start(barrier=True)  # not after an error, which other ranks may not share


_rounds = Rounds()


def build_train_valid_test_datasets(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Keep the training dataset of each model chunk, for the rounds to draw from."""
    from megatron.training import get_args

    datasets = stock(*args, **kwargs)
    if norm_ratio_arguments.options_from(get_args()).batches == ALL_BATCHES:
        provider = args[0] if args else kwargs["build_train_valid_test_datasets_provider"]
        _rounds.datasets.append(round_data.one_epoch(provider))
    else:
        _rounds.datasets.append(datasets[0])
    return datasets


def before_step(step: Step, iteration: int) -> None:
    """Keep each step, and measure before the first one if asked for."""
    from megatron.training import get_args

    if norm_ratio_arguments.options_from(get_args()).is_on:
        _rounds.before_step(step, iteration)


def after_step(optimizer: Any, iteration: int) -> None:
    """Measure if a round is due after this step."""
    if _rounds.schedule is not None:
        _rounds.schedule.after_step(iteration)


TRAINING = (
    compat.wrap(
        "megatron.training.training:build_train_valid_test_datasets",
        build_train_valid_test_datasets,
        parameters=("build_train_valid_test_datasets_provider",),
    ),
)


def report(
    record: GradientRecord,
    options: NormRatioOptions,
    iteration: int,
    known: dict[str, Any],
    write: metrics.Write,
) -> None:
    """Append the record, and what else is ``known`` of the round, to its file, and log it, on rank 0.

    A file that cannot be written, for example on a full disk, costs the record of the round and not the run. ``write``
    receives the values.
    """
    if torch.distributed.get_rank() == 0:
        try:
            RecordFile(Path(options.file)).append(record.to_json({"iteration": iteration, **known}))
        except OSError as error:
            console.warn(
                f"--norm-ratio-file {options.file} cannot be written: {error}. It lacks the round at iteration "
                f"{iteration}, and training continues. The round's numbers are in the log"
            )
    console.say(line(record, iteration))
    write({name: getattr(record, key) for name, key in METRICS.items() if getattr(record, key) is not None}, iteration)


def line(record: GradientRecord, iteration: int) -> str:
    """A round in one line of the log."""
    verdict = {True: "converged", False: "NOT converged", None: "convergence unknown"}[record.converged]
    if record.exact:
        verdict = "exact"
    if record.nonfinite:
        verdict = f"{record.nonfinite} elements are NaN or infinite"
    snr = "-" if record.snr is None else f"{record.snr:.3g}"
    return (
        f"norm ratio at iteration {iteration}: r {record.ratio:.6g} = {record.ratio_over_sqrt_d:.4f} sqrt(d), "
        f"l1 {record.l1:.6g}, l2 {record.l2:.6g}, d {record.d}, loss {record.loss:.6f}, signal to noise {snr}, "
        f"{verdict} ({record.batches} batches, {record.seconds:.1f} s)"
    )
