"""Reports for a training loop that is not ``megatron.training``'s: a script on megatron.core, or a framework's loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lion.config import ALL_BATCHES, LionError, LionOptions, NormRatioOptions, check_count
from megatron_lion.integration import compat
from megatron_lion.integration.exchange.reduce_metrics import ReduceTelemetry
from megatron_lion.integration.reporting import metrics
from megatron_lion.integration.reporting.norm_ratio.isolation import isolated
from megatron_lion.integration.reporting.norm_ratio.measure import measure_round
from megatron_lion.integration.reporting.norm_ratio.schedule import RoundSchedule, report
from megatron_lion.integration.reporting.step_telemetry import StepTelemetry

RunBatch = Callable[[int, int], Tensor | float | None]


class Reports:
    """Telemetry of Lion's steps and norm-ratio rounds, with the code and the log lines of ``--lion-telemetry`` and
    ``--norm-ratio-interval``::

        reports = megatron_lion.Reports(model, optimizer, telemetry_interval=10)
        for iteration in range(1, iterations + 1):
            ...  # forward and backward passes, optimizer.step()
            reports.after_step(iteration)

    Make it and call it on every rank. Rounds need ``run_batch``, which runs one global batch as training does, but on
    other data: forward and backward passes over its micro-batches through ``get_forward_backward_func()``, with
    ``finalize_model_grads``. It must leave the reduced gradients in the buffers and must not step. It may use the
    random generators: they are restored after the round, as everything else that training depends on.

    Args:
        model: the model, or the list of its chunks, wrapped in Megatron's DistributedDataParallel.
        optimizer: what ``get_megatron_optimizer`` returned.
        iteration: number of steps that earlier processes have made.
        telemetry_interval: report every this many steps; 0 for never. Needs Lion. With ``lion_reduce`` each report also
            has what was not sent, and the share of signs that the exact gradient would change. This costs one more
            reduction in the steps that are reported.
        norm_ratio: when rounds are due, how many batches each has, and the file of their records; None for no rounds.
        run_batch: called with the iteration and the number of the batch in the round, from 0. Draw the data from these
            two, so that every tensor-parallel and pipeline rank draws the same. Returns the mean loss of this rank's
            micro-batches; None on pipeline stages that have no loss.
        vocabulary: the tokenizer's number of words and the padded number, if the vocabulary is padded. Padded rows are
            left out of a round.
        write: receives the values of each report by name, and the iteration, on every rank: for TensorBoard or W&B.

    Issues the collectives of a round at the start if ``norm_ratio.at_start`` is set.

    Raises:
        LionError: rounds without ``run_batch``, telemetry without Lion or with its steps on the CPU, a model without
            gradient buffers, or an argument of another kind.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        iteration: int = 0,
        telemetry_interval: int = 0,
        norm_ratio: NormRatioOptions | None = None,
        run_batch: RunBatch | None = None,
        vocabulary: tuple[int, int] = (0, 0),
        write: metrics.Write = metrics.write_nowhere,
    ) -> None:
        self._model = list(model) if isinstance(model, list | tuple) else [model]
        self._optimizer, self._vocabulary, self._write = optimizer, vocabulary, write
        self._run_batch = run_batch
        self._telemetry = self._schedule = self._reduction = None
        check_count("telemetry_interval", telemetry_interval, 0, "steps (0 is never)")
        if telemetry_interval:
            if not isinstance(getattr(optimizer, "options", None), LionOptions):
                raise LionError(
                    f"telemetry_interval needs Megatron's optimizer around Lion, got {type(optimizer).__name__}: build "
                    "it with OptimizerConfig(optimizer='lion'), or remove telemetry_interval"
                )
            if any(part.config.optimizer_cpu_offload for part in compat.sub_optimizers_of(optimizer)):
                raise LionError(
                    "telemetry_interval does not see the steps of optimizer_cpu_offload: remove one of them"
                )
            self._telemetry = StepTelemetry(optimizer, telemetry_interval, write)
            if optimizer.options.reduce != "stock":
                self._reduction = ReduceTelemetry(optimizer, telemetry_interval, write, iteration=iteration)
        if not isinstance(norm_ratio, NormRatioOptions | None):
            raise LionError(f"norm_ratio must be megatron_lion.NormRatioOptions or None, got {norm_ratio!r}")
        if norm_ratio is not None and norm_ratio.is_on:
            self._require_rounds(norm_ratio.batches)
            self._schedule = RoundSchedule(norm_ratio, self._measure)
            self._schedule.start(iteration)

    def after_step(self, iteration: int) -> None:
        """Report what is due after the step that was number ``iteration``, counted from 1.

        Issues two small all-reduces for a report of telemetry, a third one with ``lion_reduce``, and the collectives of
        a round.
        """
        if self._telemetry is not None:
            self._telemetry.after_step(iteration)
        if self._reduction is not None:
            self._reduction.after_step(iteration)
        if self._schedule is not None:
            self._schedule.after_step(iteration)

    def _require_rounds(self, batches: int | str) -> None:
        if not callable(self._run_batch):
            raise LionError(
                "norm-ratio rounds need run_batch, a function that runs one global batch forward and backward, got "
                f"{self._run_batch!r}"
            )
        if batches == ALL_BATCHES:
            raise LionError(
                f"batches={ALL_BATCHES!r} needs Megatron's own loop, which knows the training split: set the number of "
                "batches that your split has, and let run_batch read it in order"
            )
        if not all(hasattr(chunk, "zero_grad_buffer") for chunk in self._model):
            names = ", ".join(dict.fromkeys(type(chunk).__name__ for chunk in self._model))
            raise LionError(
                f"norm-ratio rounds read gradients in Megatron's buffers, which {names} does not have: pass the model "
                "as DistributedDataParallel wrapped it"
            )

    def _measure(self, options: NormRatioOptions, iteration: int, *, stepped: bool) -> None:
        from megatron.core.utils import get_model_config

        assert options.batches != ALL_BATCHES
        config = get_model_config(self._model[0])
        done = 0

        def run_batch() -> tuple[float | Tensor, float]:
            nonlocal done
            assert self._run_batch is not None
            loss = self._run_batch(iteration, done)
            done += 1
            return _share(loss), 1.0

        with isolated(self._model, self._optimizer, config, stepped=stepped):
            record = measure_round(
                self._model,
                self._optimizer,
                config,
                run_batch,
                batches=options.batches,
                vocabulary=self._vocabulary,
                iteration=iteration,
            )
        report(record, options, iteration, {}, self._write)


def _share(loss: Tensor | float | None) -> float | Tensor:
    """This rank's share of a batch's mean loss, which the ranks sum up."""
    from megatron.core import parallel_state as mpu

    if loss is None or mpu.get_tensor_model_parallel_rank() != 0:  # the others have the same loss
        return 0.0
    ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
    return loss.detach().double() / ranks if torch.is_tensor(loss) else loss / ranks
