"""The parts of the check, one line each: add a line to add a part.

A part is a process of Python with its own time limit. Exit status 0 is a pass. Of earlier parts it reads only
files in the work folder, so it runs even if they failed.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

ENVIRONMENT = "environment"
SITE = "site"  # in the work folder: where the wheels are installed
SECONDS = 475.0  # for all parts: with the start and the end of the check, at most 8 minutes
REHEARSAL_SECONDS = 4.0  # for each second of a part
PEERS = (
    "torch AdamW fused",
    "torch AdamW foreach",
    "torch SGD with momentum, fused",
    "flashoptim FlashLion",
    "flashoptim FlashLion, bf16",
    "bitsandbytes Lion",
    "bitsandbytes Lion8bit",
    "Transformer Engine FusedAdam",
)
REDUCE = "tests/exchange/test_reduce_kernels.py::test_the_triton_kernels_have_the_references_bits"
TESTS = (
    "tests/test_gpu.py tests/test_triton.py tests/test_kernels.py tests/test_packed_kernels.py "
    "tests/exchange/test_digits.py tests/exchange/test_messages.py tests/exchange/test_trits.py "
    "tests/exchange/test_step_digits.py "
    # Each code, dtype and feedback once: all combinations take a minute to compile.
    f"{REDUCE}[int4-torch.float32-int8] {REDUCE}[int8-torch.bfloat16-bf16] {REDUCE}[ternary-torch.float16-None]"
)
ON_GPU = "test_gpu or triton or cuda"
# Every flag that would compile something with torch.compile, which takes longer than the run, is off.
MEGATRON = (
    "--optimizer lion --lr 3e-4 --weight-decay 0.1 --bf16 --use-distributed-optimizer --transformer-impl local "
    "--no-gradient-accumulation-fusion --no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0 "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1 "
)
MODEL = (
    "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --vocab-size 50257 --seq-length 256 "
    "--max-position-embeddings 256 --micro-batch-size 8 --global-batch-size 16 --train-iters 20 --deterministic-mode "
)
GPT = (
    "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --vocab-size 50257 --seq-length 1024 "
    "--max-position-embeddings 1024 --micro-batch-size 8 --global-batch-size 8 --train-iters 300 "
    "--exit-duration-in-mins 1 --lion-kernel fused "
)
# A rehearsal has the same flags, and after them these, which count; and more time, as it shares its machine.
SMALL_MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 257 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --distributed-backend gloo"
)
SMALL_TESTS = "-k test_gpu"
SMALL_STEP = "--numel 10000 --tensors 3 --device cpu --queued --threads 1"


@dataclass(frozen=True)
class Part:
    """``command`` is given to Python; it is ended after ``seconds``."""

    name: str
    seconds: float
    command: str


def all_parts(on_gpu: bool, work: Path, rows: Path, wheels: Path | None = None) -> list[Part]:
    """The parts in their order: on a GPU, or everything small on a CPU as a rehearsal."""
    install = f"-m pip install --quiet --no-index --no-deps --target {shlex.quote(str(work / SITE))} "
    install += shlex.join(str(wheel) for wheel in sorted(wheels.glob("*.whl"))) if wheels else ""
    device, folder, log = "cuda" if on_gpu else "cpu", shlex.quote(str(work)), f"--rows {shlex.quote(str(rows))}"
    small_tests, small_step, small_model = ("", "", "") if on_gpu else (SMALL_TESTS, SMALL_STEP, SMALL_MODEL)
    many = 3000 if on_gpu else 30
    tests = f"-m pytest -q -p no:cacheprovider --durations=5 --tb=short --maxfail=25 {TESTS} -k '{ON_GPU}'"
    step = f"-m tools.benchmark.step {log} --peers {shlex.join(PEERS)} --device cuda"
    pretrain = f"-m tools.gpu_check.pretrain --work {folder} {log} {MEGATRON}"
    same = f"-m tools.gpu_check.same_losses {log} --work {folder}"
    kernel = f"{MODEL} {small_model} --lion-kernel"
    compact = "--lion-momentum-dtype int8 --lion-master-weights remainder"
    parts = [
        *([Part("wheels", 60, install)] if wheels else []),
        Part(ENVIRONMENT, 60, f"-m tools.gpu_check.environment --device {device} {log}"),
        Part("tests", 170, f"{tests} {small_tests}"),
        Part("benchmark", 110, f"{step} --shapes gpt2-large {small_step}"),
        Part("host-times", 30, f"{step} {small_step} --numel 4096 --tensors {many} --only 'AdamW fused' 'lion fused'"),
        Part("megatron-fused", 60, f"{pretrain} --name fused {kernel} fused"),
        Part("megatron-reference", 60, f"{pretrain} --name reference {kernel} reference"),
        Part("same-losses", 20, f"{same} fused reference"),
        Part("megatron-compact", 60, f"{pretrain} --name compact {kernel} fused {compact}"),
        Part("gpt-124m", 110, f"{pretrain} --name gpt-124m {GPT} {small_model}"),
        Part("megatron-compact-reference", 60, f"{pretrain} --name compact-reference {kernel} reference {compact}"),
        Part("same-losses-compact", 20, f"{same} compact compact-reference"),
    ]
    return parts if on_gpu else [replace(part, seconds=part.seconds * REHEARSAL_SECONDS) for part in parts]
