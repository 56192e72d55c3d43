"""Runs a script as one rank of many: up to its first step, or for some steps on random tokens."""

import contextlib
import importlib
import io
import resource
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lion.config import LionError
from megatron_lion.integration import compat
from megatron_lion.integration.compat.versions import INSTALL_HINT
from megatron_lion.integration.cpu import torch_cuda
from megatron_lion.integration.register import register
from megatron_lion.integration.rehearsal import checkpoint_plan, fake_ranks, local_modules, made_up_steps

_LOOP = "megatron.training.training"
_CHECKPOINTS = "megatron.training.checkpointing"
# What a rehearsal replaces or calls in Megatron, in addition to what registration has checked.
SEAMS = (
    compat.Seam("megatron.training.arguments", "validate_args", ("args",), uses=("is_te_min_version",)),
    compat.Seam(
        _LOOP,
        "pretrain",
        uses=(
            "set_jit_fusion_options",
            "setup_model_and_optimizer",
            "build_train_valid_test_data_iterators",
            "train",
        ),
    ),
    compat.Seam(_LOOP, "train", ("forward_step_func", "model")),
    compat.Seam(_LOOP, "setup_model_and_optimizer", uses=("get_megatron_optimizer", "load_checkpoint")),
    compat.Seam(_CHECKPOINTS, "_build_sharded_state_dict_metadata", ("args",)),
    compat.Seam(_CHECKPOINTS, "generate_state_dict", ("args", "model", "optimizer", "optim_sd_kwargs")),
    compat.Seam(_CHECKPOINTS, "_load_global_dist_base_checkpoint", uses=("dist_checkpointing", "load")),
    compat.Seam("megatron.core.transformer.dot_product_attention", "DotProductAttention.__init__", ("config",)),
    compat.Seam(
        "megatron.core.transformer.multi_latent_attention",
        "MLASelfAttention.__init__",
        uses=("build_module", "q_down_proj", "kv_down_proj"),
    ),
)


@dataclass
class RankReport:
    """What one rank built. All values can be written as JSON."""

    rank: int
    world_size: int
    layout: dict[str, int] = field(default_factory=dict)
    stage: int = 0
    stages: list[int] = field(default_factory=list)
    """the ranks of this rank's pipeline"""
    replicas: list[int] = field(default_factory=list)
    """the ranks that hold the same weights"""
    stages_alike: bool = True
    """whether all stages but the first and the last have the same layers"""
    optimizer: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    buckets: list[dict[str, Any]] = field(default_factory=list)
    traffic: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None
    loaded: dict[str, Any] | None = None
    replaced: list[str] = field(default_factory=list)
    real_memory: str = ""
    """why the weights are not on the meta device; empty if they are"""
    steps: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    host_bytes: int = 0


class _Built(BaseException):
    """Ends the script where its first step would begin. Not an Exception, which a script may catch."""


def preload() -> None:
    """Import and register what every rank needs, before their processes are forked.

    Raises LionError for a Megatron without a training loop, or with another one than a rehearsal knows.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # about packages that are not here
        warnings.simplefilter("ignore")
        register()
    if not compat.has_training():
        raise LionError(
            "rehearse needs Megatron's training loop, megatron.training, which this megatron-core does not have. "
            f"{INSTALL_HINT}"
        )
    compat.require(SEAMS)
    for module in (_LOOP, _CHECKPOINTS, "megatron.core.models.gpt", "megatron.core.tokenizers.text"):
        importlib.import_module(module)


def rehearse(script: str, flags: list[str], *, rank: int, world_size: int, steps: int = 0) -> RankReport:
    """Run ``script`` with ``flags`` as rank ``rank`` of ``world_size``, in this process, which cannot be used again.

    The other ranks do not exist (``fake_ranks``). Without ``steps`` the weights, the gradients and the optimizer's
    state are on the meta device. Nothing is saved, and no log is written.

    Raises:
        LionError: the script refuses to start, or cannot be rehearsed. It prints what a real run prints.
        SystemExit: the script ended otherwise.
    """
    started = time.monotonic()
    fake_ranks.start(rank, world_size)
    register()
    report = RankReport(rank=rank, world_size=world_size)
    report.seconds["imports and registration"] = time.monotonic() - started
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *flags]
    with _Rehearsal(report, steps, started).taking_over():
        try:
            runpy.run_path(script, run_name="__main__")
        except _Built:
            report.host_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return report
    raise LionError(f"{script} ended before its first step, without building a model with Megatron's training loop")


class _Rehearsal:
    """What runs in place of functions of Megatron's loop. Each gets the function that it replaces first, as ``stock``.

    Args:
        report: is filled in on the way.
        steps: how many to make; 0 ends the script before the first.
        started: when, in monotonic seconds.
    """

    def __init__(self, report: RankReport, steps: int, started: float) -> None:
        self.report, self.steps, self.started = report, steps, started
        self._on_meta = contextlib.ExitStack()

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[None]:
        """Replace what Megatron's loop does at the flags, the model, the optimizer, the checkpoint and the data."""
        import megatron.core.datasets.utils as dataset_utils
        import megatron.training.arguments as arguments
        import megatron.training.training as training

        compat.replace_everywhere(arguments, "validate_args", partial(self._validate_args, arguments.validate_args))
        setup = partial(self._setup, training.setup_model_and_optimizer)
        with contextlib.ExitStack() as stack:
            stack.enter_context(compat.temporarily(training, setup_model_and_optimizer=setup))
            stack.enter_context(compat.temporarily(dataset_utils, compile_helpers=lambda: None))  # no data is read
            # It computes with activations in real memory, to compile kernels.
            stack.enter_context(compat.temporarily(training, set_jit_fusion_options=lambda *_, **__: None))
            if self.steps:
                stack.enter_context(made_up_steps.taking_over(self.steps, self._finish))
            yield

    def _validate_args(self, stock: Callable[..., Any], args: Any, *rest: Any, **named: Any) -> Any:
        with local_modules.transformer_engine_of_the_cluster():
            validated = stock(args, *rest, **named)
        local_modules.refuse(args)
        self.report.replaced = local_modules.replace(args)
        _write_nothing(args)
        if self.steps:
            made_up_steps.check(args)
        return validated

    def _setup(self, stock: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        import megatron.training.training as training

        self._clock("arguments and process groups")
        args = training.get_args()
        self.report.real_memory = _why_real(args, self.steps)
        if not self.report.real_memory:
            self._on_meta.enter_context(torch_cuda.answered_by(torch_cuda.META))
        build = partial(self._build, training.get_megatron_optimizer)
        load = partial(self._load, training.load_checkpoint)
        with self._on_meta, compat.temporarily(training, get_megatron_optimizer=build, load_checkpoint=load):
            model, optimizer, scheduler = stock(*positional, **named)
        self._clock("optimizer")
        _describe(self.report, args, model, optimizer)
        if not self.steps:
            raise _Built
        made_up_steps.prepare(args, self.steps)
        return model, optimizer, scheduler

    def _build(self, stock: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        self._clock("model and buffers")
        self._on_meta.close()  # what the optimizer makes for its parameters is on meta as they are
        return stock(*positional, **named)

    def _load(self, stock: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        import megatron.training.training as training

        result, loaded = checkpoint_plan.load_metadata(training.get_args(), stock, *positional, **named)
        self.report.loaded = asdict(loaded) if loaded else None
        return result

    def _finish(self, result: dict[str, Any]) -> None:
        self.report.steps = result
        raise _Built

    def _clock(self, what: str) -> None:
        """Note the seconds since the last call as those of ``what``."""
        self.report.seconds[what] = time.monotonic() - self.started - sum(self.report.seconds.values())


def _write_nothing(args: Any) -> None:
    """Turn off the logs and the process for checkpoints that Megatron starts before the first step."""
    for dest in ("tensorboard_dir", "wandb_project", "wandb_exp_name"):
        if hasattr(args, dest):
            setattr(args, dest, None)
    for dest in ("enable_one_logger", "log_progress", "use_persistent_ckpt_worker"):
        if hasattr(args, dest):
            setattr(args, dest, False)


def _why_real(args: Any, steps: int) -> str:
    if steps:
        return "--steps computes"
    if args.optimizer_cpu_offload:
        return "--optimizer-cpu-offload copies weights to the CPU"
    if args.use_cpu_initialization:
        return "--use-cpu-initialization makes each weight on the CPU"
    return ""


def _describe(report: RankReport, args: Any, model: list[Any], optimizer: Any) -> None:
    from megatron.core import parallel_state as mpu

    from megatron_lion.integration.rehearsal import sizes as measured  # it imports Megatron

    report.layout = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
        "DP": mpu.get_data_parallel_world_size(),
    }
    report.stage = mpu.get_pipeline_model_parallel_rank()
    ranks_of = torch.distributed.get_process_group_ranks
    report.stages = ranks_of(mpu.get_pipeline_model_parallel_group())
    report.replicas = ranks_of(mpu.get_data_parallel_group(with_context_parallel=True))
    report.stages_alike = _stages_are_alike(args)
    report.optimizer = args.optimizer
    report.sizes = asdict(measured.sizes(model, optimizer)) | {"on_device": measured.sizes(model, optimizer).on_device}
    report.buckets = [asdict(bucket) for bucket in measured.buckets(model)]
    report.traffic = [asdict(traffic) for traffic in measured.traffic(model, optimizer)]
    if not report.real_memory:
        plan = checkpoint_plan.plan(args, model, optimizer)
        report.checkpoint = asdict(plan) if plan else None


def _stages_are_alike(args: Any) -> bool:
    every_layer = getattr(args, "moe_layer_freq", 1) == 1
    uneven = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    return (
        every_layer
        and not any(getattr(args, dest, None) for dest in uneven)
        and not getattr(args, "hybrid_layer_pattern", None)
    )
