"""Bad input ends at once, with one message that says what to do; good input reaches Megatron as it was given."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lion import LionError
from megatron_lion.integration import compat
from tests.harness import BATCH, CPU, MODEL, PRETRAIN_GPT, Run, torchrun
from tests.versions import since

ERROR = "megatron-lion: error: "
FSDP = "--use-megatron-fsdp --data-parallel-sharding-strategy optim"
LION = "--optimizer lion --lr 1e-4"
ADAM = "--optimizer adam --lr 1e-4"
MUON = "--optimizer muon --muon-scalar-optimizer lion --lr 1e-4"
DISTRIBUTED = "--use-distributed-optimizer"
RUN = "-m megatron_lion.run"
ROUNDS = "--norm-ratio-interval 10"


def python(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that sees no GPU, with ``text`` as its input; it fails where it takes longer than two minutes."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "MEGATRON_LION_DEVICE": "cpu", **environment},
    )


def prepend(folder: Path) -> str:
    """A PYTHONPATH in which ``folder`` comes first."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


# ---- the command line, in Megatron's own parser and validation ----

# Reads command lines as JSON; answers each with its message, or with what became of it.
PARSE = """
import json, sys
import megatron_lion

megatron_lion.register()
from megatron.training.arguments import parse_args, validate_args

KEPT = ("optimizer", "lion_beta1", "lion_beta2", "use_distributed_optimizer", "use_layer_wise_distributed_optimizer")


def outcome(line):
    sys.argv = ["pretrain_gpt.py", *line.split()]
    try:
        args = parse_args()
        validate_args(args)
    except megatron_lion.LionError as error:
        return str(error)
    except (Exception, SystemExit) as error:
        return {"crashed with": repr(error)}
    return {name: getattr(args, name, False) for name in KEPT}  # 0.17 has no layer-wise optimizer


outcomes = {line: outcome(line) for line in json.load(sys.stdin)}
print("OUTCOMES", json.dumps(outcomes))
"""

# What a wrong command line must be told: each of the words on the right is in the message.
WRONG = {
    "--optimizer lino --lr 1e-4": ("'lino'", "did you mean 'lion'?", "adam", "sgd", "--help"),
    "--optimizer lion": ("needs --lr", "lower than AdamW's"),
    "--optimizer lion --lr nan": ("--lr must be a finite number", "nan"),
    "--optimizer lion --lr inf": ("--lr must be a finite number", "inf"),
    "--optimizer lion --lr -0.1": ("--lr must be a finite number >= 0", "-0.1"),
    "--optimizer lion --lr 1e-5 --min-lr 1e-4": ("--min-lr 0.0001 is greater than --lr 1e-05", "lower it"),
    "--optimizer lion --lr small": ("--lr", "'small'", "--help"),
    f"{LION} --lion-beta1 1.5": ("--lion-beta1 must be in [0, 1)", "1.5", "usual value is 0.9"),
    f"{LION} --lion-beta2 1": ("--lion-beta2 must be in [0, 1)", "got 1;"),
    f"{LION} --lion-beta2 -0.1": ("--lion-beta2 must be in [0, 1)", "-0.1", "0.95"),
    f"{LION} --lion-beta2 nan": ("--lion-beta2 must be in [0, 1)", "nan"),
    f"{LION} --weight-decay -1": ("--weight-decay must be a finite number >= 0", "-1"),
    f"{LION} --lion-beta3 0.9": ("--lion-beta3", "--help"),
    f"{LION} --hiden-layers=3 -train-iters 5": ("--hiden-layers=3", "-train-iters: did you mean '--train-iters'? All"),
    f"{LION} --lion-momentum int8": (
        "arguments: --lion-momentum int8. --lion-momentum: did you mean '--lion-momentum-",
    ),
    f"{LION} --data-path 1 text/a 2 text/b.idx": ("--data-path text/b.idx names one of the two files", "use text/b."),
    "--optimizer adam --lr 1e-4 --train-data-path a.bin": ("--train-data-path a.bin names one", "use a. Megatron adds"),
    f"{LION} --pipeline-model-parallel-size 3": ("PP 3", "multiple of 3 ranks", "1 were started", "--nproc-per-node 3"),
    f"{LION} --context-parallel-size 2": ("CP 2", "multiple of 2 ranks", "--context-parallel-size"),
    f"{LION} {DISTRIBUTED} --lion-init-from adma": ("--lion-init-from 'adma'", "did you mean 'adam'?", "fresh"),
    f"{LION} {DISTRIBUTED} --lion-init-from adam --no-load-optim": (
        "--lion-init-from adam",
        "--no-load-optim",
        "remove",
    ),
    f"{LION} {DISTRIBUTED} --lion-init-from fresh --finetune": ("--lion-init-from fresh", "--finetune", "remove one"),
    f"{LION} --lion-init-from adam": ("--lion-init-from adam needs --use-distributed-optimizer", "--no-load-optim"),
    f"{ADAM} --lion-init-from adam": ("no effect with --optimizer adam", "add --optimizer lion"),
    f"{ADAM} --lion-momentum-dtype int4": ("dtype int4 has no effect with --optimizer adam: remove it",),
    f"{ADAM} --lion-master-weights remainder": ("--lion-master-weights remainder has no effect with",),
    f"{ADAM} --lion-kernel fusd": ("--lion-kernel fusd has no effect with --optimizer adam",),
    f"{ADAM} --lion-gather-refresh 5": ("--lion-gather-refresh 5 has no effect with --optimizer adam",),
    f"{ADAM} --lion-beta1 0.9": ("--lion-beta1 0.9 has no effect with --optimizer adam",),
    "--optimizer sgd --lr 1e-4 --lion-fast-norm": ("--lion-fast-norm has no effect with --optimizer sgd", "remove it"),
    "--optimizer muon --lr 1e-4 --lion-kernel fused": ("--lion-kernel fused has no effect with --optimizer muon",),
    f"{MUON} --lion-momentum-dtype bf16": ("--lion-momentum-dtype bf16 has no effect with --optimizer muon",),
    f"{LION} --norm-ratio-interval -1": ("--norm-ratio-interval must be >= 0", "-1"),
    f"{LION} --norm-ratio-interval 10 --norm-ratio-batches 0": ("--norm-ratio-batches must be >= 1", "got 0"),
    f"{LION} --norm-ratio-interval 10 --norm-ratio-batches most": ("whole number or 'all', got 'most'",),
    f"{LION} {ROUNDS} --norm-ratio-batches all --num-experts 2 --moe-aux-loss-coeff 0.1": (
        "--norm-ratio-batches all is not supported",
        "--moe-aux-loss-coeff 0",
    ),
    f"{LION} --norm-ratio-batches 5": ("--norm-ratio-batches has no effect without --norm-ratio-interval",),
    f"{LION} --norm-ratio-file x.jsonl": ("--norm-ratio-file has no effect without",),
    f"{LION} --norm-ratio-interval ten": ("--norm-ratio-interval", "'ten'", "--help"),
    f"--optimizer muon --lr 1e-4 {ROUNDS}": ("lion, sgd, adam, not with muon", "remove --norm-ratio-interval"),
    f"{LION} {ROUNDS} --dataloader-type external": (
        "--dataloader-type external is not supported",
        "single or cyclic",
    ),
    f"{LION} {ROUNDS} --cuda-graph-impl full_iteration": ("--cuda-graph-impl full_iteration is not supported",),
    f"--optimizer sgd --lr 1e-4 {ROUNDS} --mtp-num-layers 1": ("--mtp-num-layers is not supported", "remove"),
}
FOREIGN = {
    f"{LION} --ckpt-format fsdp_dtensor": ("--ckpt-format fsdp_dtensor", "Megatron-FSDP", "use torch_dist"),
    f"{LION} --ckpt-format torch_dcp": ("--ckpt-format torch_dcp", "torch FSDP2", "use torch_dist"),
    f"{LION} {FSDP}": ("--use-megatron-fsdp cannot save", "torch_dist", "add --ckpt-format fsdp_dtensor"),
    f"{LION} {FSDP} --num-distributed-optimizer-instances 2": (
        "instances 2",
        "needs --overlap-grad-reduce",
    ),
    f"{LION} --use-torch-fsdp2": ("--use-torch-fsdp2 is not supported", "cannot resume", "Use --use-megatron-fsdp"),
    f"{LION} --optimizer-cuda-graph": ("--optimizer-cuda-graph is not supported", "lion", "Remove the flag"),
}
SIGNS = {
    f"{LION} {DISTRIBUTED} --lion-gather sings": ("--lion-gather 'sings' is unknown", "did you mean 'signs'?"),
    f"{LION} {DISTRIBUTED} --lion-gather-refresh 5": ("--lion-gather-refresh has no effect without",),
    f"{LION} {DISTRIBUTED} --lion-gather signs --lion-gather-refresh -1": ("must be >= 0 steps", "got -1"),
    f"{LION} --lion-gather signs": ("--lion-gather signs needs --use-distributed-optimizer",),
    f"{ADAM} --lion-gather signs": ("--lion-gather signs has no effect with --optimizer adam",),
    f"{ADAM} --lion-error-feedback bf16": ("bf16 has no effect with --optimizer adam: remove it",),
    f"{LION} {DISTRIBUTED} --bf16 --lion-gather signs --optimizer-cpu-offload": (
        "--lion-gather signs",
        "--optimizer-cpu-offload",
    ),
    f"{LION} {DISTRIBUTED} --bf16 --lion-gather signs --fp8-param-gather": ("signs is not supported with --fp8-param",),
    f"{LION} {DISTRIBUTED} --fp16 --lion-gather signs --lion-kernel fused": ("--lion-kernel fused and --fp16", "auto"),
    f"{LION} {DISTRIBUTED} --lion-gather signs {FSDP}": ("--lion-gather signs is not supported", "params"),
    f"{LION} {DISTRIBUTED} --lion-gather signs --cuda-graph-impl local": ("signs is not supported with --cuda-graph",),
    f"{LION} {DISTRIBUTED} --lion-gather signs --overlap-param-gather-with-optimizer-step": (
        "signs is not supported with --overlap-param-gather-with-optimizer-step",
        "Use --lion-gather params",
    ),
}
REFUSES_SIGNS = pytest.mark.refuses(
    "`--lion-gather signs` with CPU offload, fp8 and fp4 parameters, FSDP, CUDA graphs, mixed devices"
)
REFUSES = pytest.mark.refuses("torch FSDP2, formats of another way to shard, optimizer CUDA graphs")

# What a right command line must become: optimizer, betas, then Megatron's two kinds of distributed optimizer.
RIGHT = {
    LION: ("lion", 0.9, 0.95, False, False),
    f"{LION} --lion-beta1 0.8": ("lion", 0.8, 0.95, False, False),
    f"{LION} --lion-beta1 0 --lion-beta2 0.97": ("lion", 0.0, 0.97, False, False),
    f"{LION} {DISTRIBUTED}": ("lion", 0.9, 0.95, True, False),
    ADAM: ("adam", 0.95, 0.98, False, False),
    f"{ADAM} --lion-kernel auto --lion-gather params": ("adam", 0.95, 0.98, False, False),
    f"{ADAM} --lion-beta1 0.95": ("adam", 0.95, 0.98, False, False),  # Megatron's default
    f"{ADAM} {DISTRIBUTED}": ("adam", 0.95, 0.98, True, False),
    "--optimizer muon --lr 1e-4": ("muon", 0.95, 0.98, False, False),
    "--optimizer muon --lr 1e-4 --lion-beta1 0.7 --lion-beta2 0.6": ("muon", 0.7, 0.6, False, False),
    f"{MUON} --lion-beta1 0.7 --lion-kernel fused": ("muon", 0.7, 0.98, False, False),
    f"--optimizer muon --lr 1e-4 {DISTRIBUTED}": ("muon", 0.95, 0.98, False, True),
    "--optimizer sgd --lr 1e-4 --use-precision-aware-optimizer": ("sgd", 0.95, 0.98, False, False),
}


# 0.17's own parser and validation refuse these.
NEWER = (
    f"{LION} {ROUNDS} --cuda-graph-impl full_iteration",
    f"--optimizer muon --lr 1e-4 {DISTRIBUTED}",
    f"{ADAM} --lion-beta1 0.95",
    f"{MUON} --lion-momentum-dtype bf16",
    f"{MUON} --lion-beta1 0.7 --lion-kernel fused",
)


def cases(lines: dict[str, tuple[Any, ...]], *marks: pytest.MarkDecorator) -> list[Any]:
    """Parameters ``line`` and what is expected of it."""
    return [
        pytest.param(
            *item,
            id=item[0],
            marks=[*marks, *[since("0.18")] * (item[0] in NEWER), *[since("0.17")] * (FSDP in item[0])],
        )
        for item in lines.items()
    ]


@pytest.fixture(scope="module")
def outcome() -> Callable[[str], Any]:
    """What becomes of each line above in the Megatron that is installed: one process for all."""
    lines = {f"{MODEL} {BATCH} {CPU} --train-iters 4 {line}": line for line in (*WRONG, *FOREIGN, *SIGNS, *RIGHT)}
    result = python("-c", PARSE, text=json.dumps(list(lines)))
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(result.stdout.split("OUTCOMES ")[-1])
    return {line: answers[whole] for whole, line in lines.items()}.__getitem__


@pytest.mark.parametrize(("line", "words"), cases(WRONG) + cases(FOREIGN, REFUSES) + cases(SIGNS, REFUSES_SIGNS))
@pytest.mark.refuses("Megatron's loop / refusals")
def test_a_wrong_command_line_is_refused_with_what_to_do_instead(
    outcome: Callable[[str], Any], line: str, words: tuple[str, ...]
) -> None:
    message = outcome(line)
    assert isinstance(message, str), f"accepted, as {message}"
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(("line", "expected"), cases(RIGHT))
def test_a_right_command_line_keeps_its_values_and_megatron_its_own_defaults(
    outcome: Callable[[str], Any], line: str, expected: tuple[Any, ...]
) -> None:
    result = outcome(line)
    assert isinstance(result, dict), result
    assert tuple(result.values()) == expected


def test_a_yaml_configuration_that_asks_for_lion_is_refused_not_run_unchecked(tmp_path: Path) -> None:
    configuration = tmp_path / "run.yaml"
    configuration.write_text("{optimizer: lion, lr: 1.0e-4, enable_msc: false, disable_msc_deprecated: false, ")
    with configuration.open("a") as file:
        file.write("use_checkpoint_args: false, data_path: text, model_parallel: {tensor_model_parallel_size: 1}}")
    script = (
        "import megatron_lion; megatron_lion.register()\n"
        "from megatron_lion.integration.loop.pretrain import parse_and_validate_args; parse_and_validate_args({})"
    )
    result = python("-c", script, "--optimizer", "lion", "--yaml-cfg", str(configuration))
    assert "LionError: --yaml-cfg is not supported with --optimizer lion" in result.stderr


# ---- under torchrun: once, on every kind of start, without a hang ----

UNDER_TORCHRUN = {
    "a misspelt optimizer": ("--optimizer lino --lr 1e-4", PRETRAIN_GPT, "did you mean 'lion'?"),
    "a refused flag": (f"{LION} --use-torch-fsdp2", f"{RUN} {PRETRAIN_GPT}", "--use-torch-fsdp2 is not supported"),
    "too few ranks for TP x PP": (
        f"{LION} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        PRETRAIN_GPT,
        "TP 2 x PP 2 needs a multiple of 4 ranks, but 2 were started: use torchrun --nproc-per-node 4",
    ),
}


@pytest.mark.parametrize(
    ("flags", "script", "message"),
    [
        pytest.param(*case, id=name, marks=[] if name == "a refused flag" else [pytest.mark.slow])
        for name, case in UNDER_TORCHRUN.items()
    ],
)
def test_two_ranks_print_one_message_and_end(flags: str, script: Path | str, message: str) -> None:
    if isinstance(script, str):
        *module, path = script.split()
        script, flags = " ".join(module), f"{path} {flags}"
    flags = f"{flags} {MODEL} {BATCH} {CPU} --train-iters 4"
    run: Run = torchrun(flags, ranks=2, script=script, environment={"CUDA_VISIBLE_DEVICES": ""}, timeout=90)
    assert run.returncode not in (0, -9), run.output[-3000:]  # -9: killed at the time-out
    assert [message in line for line in run.output.splitlines() if ERROR in line] == [True], run.output[-3000:]
    assert "LionError" not in run.output, "a rank printed a traceback"


# ---- the environment ----


def start(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_lion.run`` of a script in ``folder`` that must not be reached."""
    script = folder / "pretrain.py"
    script.write_text("print('REACHED')")
    result = python("-m", "megatron_lion.run", str(script), **environment)
    assert "REACHED" not in result.stdout
    return result


def the_message(result: subprocess.CompletedProcess[str]) -> str:
    """The one message of a start that ended with exit status 2 and no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(ERROR)]
    return line


# Python runs a sitecustomize.py at its start: here, one that hides packages.
HIDE = """
import sys


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hide())
"""


def test_without_megatron_it_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=["megatron"]))
    message = the_message(start(tmp_path, PYTHONPATH=prepend(tmp_path)))
    assert "megatron-core is not installed in" in message
    assert "pip install 'megatron-core==" in message
    assert "PYTHONPATH" in message


@pytest.mark.parametrize("version", ["0.12.1", "0.21.0", "0.190.0"])
def test_an_unsupported_megatron_is_named_with_its_place_and_what_is_supported(tmp_path: Path, version: str) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('imported all the same')")
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (core / "package_info.py").write_text("".join(f"{name} = {number}\n" for name, number in numbers))
    message = the_message(start(tmp_path, PYTHONPATH=prepend(tmp_path)))
    assert f"megatron-core {version} ({core}) is not supported; supported: 0.16.x, 0.17.x" in message
    assert "pip install 'megatron-core==0.19." in message


# Registers with one seam more than Megatron has; prints the message, then whether anything was replaced.
CHANGED_SEAM = """
import megatron_lion
from megatron_lion.integration.compat import seams

seams.{seams} += (seams.Seam("{module}", "{name}", {needs}),)
try:
    megatron_lion.register()
except megatron_lion.LionError as error:
    print("MESSAGE", error)
import megatron.core.optimizer, megatron.training.arguments
for function in (megatron.core.optimizer.get_megatron_optimizer, megatron.training.arguments.validate_args):
    print("FROM", *getattr(function, "wrapper", function).__code__.co_filename.split("/")[-2:])
"""


@pytest.mark.parametrize(
    ("seams", "module", "name", "needs", "problem"),
    [
        ("CORE", "megatron.core.optimizer", "get_megatron_optimizer", "('color',)", "has changed: no parameter"),
        pytest.param(
            "CORE",
            "megatron.core.optimizer",
            "ChainedOptimizer.step",
            "(), ('paint',)",
            "has changed: it no longer",
            marks=pytest.mark.slow,
        ),
        ("TRAINING", "megatron.training.arguments", "validate_everything", "('args',)", "is gone"),
    ],
)
def test_a_megatron_that_has_changed_is_refused_by_name_and_left_as_it_was(
    seams: str, module: str, name: str, needs: str, problem: str
) -> None:
    script = CHANGED_SEAM.format(seams=seams, module=module, name=name, needs=needs)
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    message, *sources = [line for line in result.stdout.splitlines() if line.startswith(("MESSAGE", "FROM"))]
    assert f"{module}.{name} {problem}" in message
    assert "pip install 'megatron-core==" in message
    assert sources == ["FROM optimizer __init__.py", "FROM training arguments.py"]


def test_a_package_that_several_modules_need_is_named_once() -> None:
    seams = [compat.Seam(f"absent.{name}", "function") for name in ("one", "two")]
    with pytest.raises(LionError, match=r"absent\.one cannot be imported \(No module named 'absent'") as raised:
        compat.require(seams)
    assert "absent.two" not in str(raised.value)


def test_a_package_that_fails_when_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformer Engine without its libraries does. Another Megatron would not help."""
    (tmp_path / "broken.py").write_text("raise RuntimeError('no libraries')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        LionError, match=r"broken\.py raises RuntimeError: no libraries\. Repair or uninstall"
    ) as raised:
        compat.require([compat.Seam("broken", "function")])
    assert "pip install" not in str(raised.value)


def test_a_device_that_does_not_exist_gets_the_two_that_do(tmp_path: Path) -> None:
    message = the_message(start(tmp_path, MEGATRON_LION_DEVICE="gpu"))
    assert "MEGATRON_LION_DEVICE 'gpu' is unknown" in message
    assert "Valid: cpu, cuda" in message


def test_the_cpu_backend_refuses_to_hide_a_gpu() -> None:
    result = python(
        "-c",
        "import torch, megatron_lion\n"
        "torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: 'NVIDIA H100'\n"
        "try:\n    megatron_lion.register()\n"
        "except megatron_lion.LionError as error:\n    print(error)\n"
        "print(torch.Tensor.cuda.__module__ if hasattr(torch.Tensor.cuda, '__module__') else 'stock')",
    )
    message, tensor_cuda = result.stdout.splitlines()
    assert "MEGATRON_LION_DEVICE=cpu, but this machine has a GPU (NVIDIA H100)" in message
    assert "Unset MEGATRON_LION_DEVICE" in message
    assert "CUDA_VISIBLE_DEVICES=" in message
    assert tensor_cuda == "stock"


def test_the_cpu_backend_refuses_to_come_after_megatrons_import() -> None:
    result = python("-c", "import megatron.core, megatron_lion; megatron_lion.register()")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "MEGATRON_LION_DEVICE=cpu must take effect before Megatron is imported: register megatron_lion first" in last


@pytest.mark.parametrize(
    ("script", "words"),
    [((), "no script given: torchrun -m megatron_lion.run"), (("gpt.py",), "gpt.py is not a file: pass the path")],
    ids=["without a script", "with a script that is not there"],
)
def test_run_says_what_to_give(script: tuple[str, ...], words: str) -> None:
    assert words in the_message(python("-m", "megatron_lion.run", *script))


def test_a_rank_other_than_0_ends_with_the_same_status_and_says_which_it_is() -> None:
    result = python("-m", "megatron_lion.run", RANK="1", LOCAL_RANK="0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{ERROR}[rank 1, {os.uname().nodename}] no script given")
