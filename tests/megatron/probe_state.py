"""Run on ranks in the place of ``pretrain_gpt.py``: a real run that also leaves its optimizer state, shard by shard.

    probe_state.py WHAT <Megatron's flags>

WHAT is ``save``: with the one checkpoint that it writes, after iteration PROBE_SAVE_AT, the state goes to PROBE_OUTPUT
and the run on to its end; ``load``: the state that it begins with goes there; ``stock-save``: as ``save``, with the
state gathered for a checkpoint as stock Megatron does it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import megatron_lion
from tests.megatron import optimizer_state

megatron_lion.register()

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration.optimizer.repaired import RepairedDistributedOptimizer  # noqa: E402


def main() -> None:
    import megatron.training.training as training

    what = sys.argv.pop(1)
    folder = Path(os.environ["PROBE_OUTPUT"])
    stock_save, stock_train = training.save_checkpoint, training.train

    def save_checkpoint(iteration: int, model: list[Any], optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if iteration == int(os.environ["PROBE_SAVE_AT"]):
            optimizer_state.write(folder, model, optimizer)
            stock_save(iteration, model, optimizer, *args, **kwargs)

    def train(forward_step: Any, model: list[Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if what == "load":
            optimizer_state.write(folder, model, optimizer)
        return stock_train(forward_step, model, optimizer, *args, **kwargs)

    training.save_checkpoint, training.train = save_checkpoint, train
    if what == "stock-save":
        for name in ("sharded_param_state_fully_reshardable", "sharded_param_state_dp_reshardable"):
            delattr(RepairedDistributedOptimizer, name)
        del RepairedDistributedOptimizer.get_parameter_state_dp_reshardable
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
