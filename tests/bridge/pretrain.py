"""A tiny GPT through Megatron-Bridge's ``pretrain`` on a CPU, with Lion as its command line has it.

    torchrun --nproc-per-node 2 tests/bridge/pretrain.py --iterations 8 --save FOLDER optimizer.lion_beta2=0.98

Bridge itself reads the YAML file of --config-file and the overrides. Reports telemetry of each step and, with
--rounds FILE, norm-ratio rounds. Prints what Bridge says of an override with a misspelled name.
"""

import argparse
from typing import Any

import megatron_lion

megatron_lion.register()
from tests.bridge import stand_ins  # noqa: E402

stand_ins.install()
import torch  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.training import optim  # noqa: E402
from megatron.bridge.training import pretrain as bridge  # noqa: E402
from megatron.bridge.training.callbacks import Callback  # noqa: E402
from megatron.bridge.training.config import (  # noqa: E402
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.utils.omegaconf_utils import (  # noqa: E402
    OverridesError,
    process_config_with_overrides,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402


class Report(Callback):
    """Telemetry and rounds in Bridge's loop."""

    def __init__(self, rounds: str | None) -> None:
        self.rounds = megatron_lion.NormRatioOptions(interval=2, batches=2, file=rounds) if rounds else None

    def on_train_start(self, context: Any) -> None:
        self.model = context.model
        self.reports = megatron_lion.Reports(
            context.model,
            context.optimizer,
            iteration=context.state.train_state.step,
            telemetry_interval=1,
            norm_ratio=self.rounds,
            run_batch=self.run_batch,
        )

    def on_train_step_end(self, context: Any) -> None:
        self.reports.after_step(context.state.train_state.step + 1)

    def run_batch(self, iteration: int, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * iteration + index)
        losses = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=iter(torch.randint(255, (2, 2, 33), generator=generator)),
            model=self.model,
            num_microbatches=2,
            seq_length=32,
            micro_batch_size=2,
            forward_only=False,
        )
        return torch.stack([entry["loss"] for entry in losses]).mean()

    @staticmethod
    def forward_step(batches: Any, model: Any) -> Any:
        tokens = next(batches)
        positions = torch.arange(32).expand_as(tokens[:, :-1])
        mask = torch.ones(32, 32, dtype=torch.bool).triu(1)[None, None]
        losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
        return losses, lambda losses: (losses.float().mean(), {"loss": losses.float().mean().detach()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*", metavar="optimizer.NAME=VALUE")
    parser.add_argument("--config-file")
    parser.add_argument("--optimizer", default="lion")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--step", type=int)
    parser.add_argument("--rounds")
    args = parser.parse_args()
    print("built by", optim.get_megatron_optimizer.wrapper.__module__, flush=True)
    config = ConfigContainer(
        model=GPTModelProvider(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            seq_length=32,
            vocab_size=256,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
        ),
        optimizer=OptimizerConfig(
            optimizer=args.optimizer,
            lr=1e-4,
            min_lr=1e-5,
            weight_decay=0.1,
            bf16=True,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_decay_iters=20,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        train=TrainingConfig(train_iters=args.iterations, global_batch_size=8, micro_batch_size=2),
        validation=ValidationConfig(eval_iters=0),
        dataset=MockGPTDatasetConfig(
            random_seed=1234,
            seq_length=32,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        logger=LoggerConfig(log_interval=1),
        checkpoint=CheckpointConfig(save=args.save, load=args.load, save_interval=4, ckpt_step=args.step),
    )
    try:
        process_config_with_overrides(config, cli_overrides=["optimizer.lion_momentum_dtyp=bf16"])
    except OverridesError as error:
        print("misspelled:", str(error).splitlines()[0], flush=True)
    config = process_config_with_overrides(config, args.config_file, args.overrides)
    bridge.pretrain(config, forward_step, callbacks=[Report(args.rounds)] if args.optimizer == "lion" else None)


if __name__ == "__main__":
    main()
