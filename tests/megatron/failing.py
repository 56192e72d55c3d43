"""Run in the place of ``pretrain_gpt.py``: fails after its second step, with the exception that FAILURE names."""

import os

import megatron_lion

megatron_lion.register()

from launch import pretrain_gpt  # noqa: E402
from megatron_lion.integration import loop_callbacks  # noqa: E402

FAILURES = {"RuntimeError": RuntimeError("failed on purpose"), "SystemExit": SystemExit(1)}


def fail(optimizer: object, iteration: int) -> None:
    if iteration == 2:
        raise FAILURES[os.environ["FAILURE"]]


if __name__ == "__main__":
    loop_callbacks.after_step.append(fail)
    pretrain_gpt.main()
