"""`megatron-lion enable` and `disable` for real: in an environment of their own, with scripts that never name us."""

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import megatron_lion
from megatron_lion import hook
from megatron_lion.integration import compat
from megatron_lion.integration.compat.versions import megatron_version
from tests.harness import BATCH, CPU, MODEL, PRETRAIN_GPT, RATE, text_flags

CLONE = Path(megatron_lion.__file__).resolve().parent.parent

# From which files come the two names under which Megatron builds the optimizer, and its parser's check of the name?
WHICH = """
import argparse, pathlib
import megatron.training
import megatron.core.optimizer, megatron.training.training
from megatron.training.arguments import add_megatron_arguments

options = {action.dest: action for action in add_megatron_arguments(argparse.ArgumentParser())._actions}
for function in (
    megatron.training.training.get_megatron_optimizer,
    megatron.core.optimizer.get_megatron_optimizer,
    options["optimizer"].type,
):
    code = getattr(getattr(function, "wrapper", function), "__code__", None)
    print("/".join(pathlib.Path(code.co_filename).parts[-2:]) if code else function)
"""
OURS = ["optimizer/factory.py", "optimizer/factory.py", "flags/arguments.py"]
STOCK = ["optimizer/__init__.py", "optimizer/__init__.py", "<class 'str'>"]


@dataclass
class Environment:
    """A virtual environment that sees the packages of the environment that runs the tests."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    @property
    def hook(self) -> Path:
        return self.site_packages / "megatron_lion_hook.pth"

    @property
    def packages(self) -> Path:
        """The file that lets it see them. Sorted before the hook, so read before it, as an editable install's is."""
        return self.site_packages / "everything_else.pth"

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run its interpreter outside the clone; on the CPU unless ``environment`` says otherwise."""
        return subprocess.run(
            [self.folder / "bin" / "python", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.folder,
            env={
                **os.environ,
                **{"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "MEGATRON_LION_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
                **environment,
            },
        )

    def megatron_lion(self, command: str) -> str:
        """Run one command of ours, which must succeed. Returns what it said."""
        result = self.python("-m", "megatron_lion.cli", command)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def which(self, before: str = "") -> list[str]:
        """The answers of ``WHICH``, run after the lines ``before``."""
        result = self.python("-c", before + WHICH)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.folder], check=True)
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    made.packages.write_text("\n".join([str(CLONE), *installed]))
    return made


def test_enable_makes_a_plain_script_ours_and_disable_makes_it_stock_again(environment: Environment) -> None:
    assert "enabled in" in environment.megatron_lion("enable")
    assert environment.hook.is_file()
    assert environment.which() == OURS
    assert "disabled in" in environment.megatron_lion("disable")
    assert not environment.hook.exists()
    assert environment.which() == STOCK


def test_a_script_that_first_asks_whether_megatron_is_there_still_gets_ours(environment: Environment) -> None:
    environment.megatron_lion("enable")
    ask = "\n".join(
        f"import importlib.util; importlib.util.find_spec({module!r})"
        for module in ("megatron.core", "megatron.core.optimizer", "megatron.training")
    )
    assert environment.which(before=ask) == OURS


@pytest.mark.supports("`megatron-lion enable`", "every parameter on Lion under a script that registers nothing")
def test_an_enabled_hook_trains_every_parameter_with_lion_under_a_script_that_registers_nothing(
    environment: Environment, text: Path
) -> None:
    environment.megatron_lion("enable")
    script = environment.folder / "pretrain_gpt.py"
    nothing = "import megatron_lion\nmegatron_lion.register = lambda: None  # only the hook registers\n"
    script.write_text(nothing + PRETRAIN_GPT.read_text())
    flags = f"{MODEL} {BATCH} {RATE} {CPU} {text_flags(text)} --optimizer lion --train-iters 2".split()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    result = environment.python(*torchrun, str(script), *flags)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "megatron-lion: lion on 28 of 28 parameters" in result.stdout
    assert "betas (0.9, 0.95)" in result.stdout


def test_a_plain_start_imports_three_small_modules_for_the_hook(environment: Environment) -> None:
    show = "import sys; print(*sys.modules)"
    plain = set(environment.python("-c", show).stdout.split())
    environment.megatron_lion("enable")
    hooked = set(environment.python("-c", show).stdout.split())
    assert hooked - plain == {"megatron_lion", "megatron_lion.version", "megatron_lion.hook"}


def test_threads_that_import_two_of_megatrons_modules_at_once_both_get_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    searching, found = threading.Event(), threading.Event()

    class Slow:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            if name == "megatron.core":
                searching.set()
                found.wait(timeout=60)
            return spec_from_file_location(name, __file__) if name in hook.STEPS else None

    finder = hook.MegatronFinder()
    monkeypatch.setattr(sys, "meta_path", [finder, Slow])
    first = threading.Thread(target=finder.find_spec, args=("megatron.core",))
    first.start()
    assert searching.wait(timeout=60)
    spec = finder.find_spec("megatron.training")
    found.set()
    first.join()
    assert spec is not None and "exec_module" in vars(spec.loader)


def test_an_interpreter_that_never_imports_megatron_does_not_pay_for_torch(environment: Environment) -> None:
    environment.megatron_lion("enable")
    script = "import sys; print(*(name for name in ('megatron_lion.hook', 'torch', 'megatron') if name in sys.modules))"
    assert environment.python("-c", script).stdout.split() == ["megatron_lion.hook"]


def test_enabling_twice_and_disabling_twice_do_no_harm(environment: Environment) -> None:
    environment.megatron_lion("enable")
    once = environment.hook.read_text()
    environment.megatron_lion("enable")
    assert environment.hook.read_text() == once
    assert [path.name for path in environment.site_packages.glob("*lion*")] == [environment.hook.name]
    environment.megatron_lion("disable")
    environment.megatron_lion("disable")
    assert not environment.hook.exists()


def test_a_hook_left_behind_by_an_uninstalled_package_breaks_no_interpreter(environment: Environment) -> None:
    environment.megatron_lion("enable")
    environment.packages.write_text("")
    result = environment.python("-c", "import importlib.util; print(importlib.util.find_spec('megatron_lion'))")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "None", "")


# Asks for an optimizer in both ways that Megatron has: by a configuration and on the command line.
ASK = """
import sys
import megatron.core.optimizer, megatron.training
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.training.arguments import parse_args, validate_args

args = parse_args()
if args.optimizer == "lion":
    try:
        get_megatron_optimizer(OptimizerConfig(optimizer="lion", lr=1e-4), [])
    except ValueError as error:
        print("BUILD", error)
    validate_args(args)
print("reached the end")
"""


def altered(folder: Path, file: str, old: str, new: str) -> str:
    """A PYTHONPATH with the installed Megatron in which ``new`` stands for ``old`` in ``file`` of megatron.core."""
    stock, core = compat.megatron_path(), folder / "megatron" / "core"
    assert stock is not None
    changed = core / file
    for made in reversed([parent for parent in changed.parents if parent.is_relative_to(core)]):
        made.mkdir(parents=True)
        for entry in (stock / made.relative_to(core)).iterdir():
            if not changed.is_relative_to(made / entry.name):
                (made / entry.name).symlink_to(entry)
    text = (stock / file).read_text()
    assert old in text
    changed.write_text(text.replace(old, new))
    (core.parent / "training").symlink_to(stock.parent / "training")
    return str(folder)


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Our lines in the errors of ``result``."""
    return [line for line in result.stderr.splitlines() if line.startswith("megatron-lion: ")]


ASK_FLAGS = f"{MODEL} {BATCH} {RATE} {CPU} --train-iters 2".split()
REFUSAL = "--optimizer lion is not possible here: megatron-core "


@pytest.mark.slow
def test_an_unsupported_megatron_is_left_alone_but_for_lion(environment: Environment, tmp_path: Path) -> None:
    environment.megatron_lion("enable")
    path = altered(tmp_path / "unsupported", "package_info.py", "MINOR = ", "MINOR = 9")
    adam, lion = (
        environment.python("-c", ASK, "--optimizer", name, *ASK_FLAGS, PYTHONPATH=path) for name in ("adam", "lion")
    )
    assert (adam.returncode, lion.returncode) == (0, 1), adam.stderr[-3000:] + lion.stderr[-3000:]
    for result in (adam, lion):
        warning = said(result)[0]
        assert warning.startswith("megatron-lion: warning: megatron-core 0.9")
        assert "supported: 0.16.x" in warning
    assert len(said(adam)) == 1
    assert adam.stdout.splitlines()[-1] == "reached the end"
    assert f"BUILD {REFUSAL}0.9" in lion.stdout
    (error,) = said(lion)[1:]
    assert error.startswith(f"megatron-lion: error: {REFUSAL}0.9")


@pytest.mark.slow
def test_a_megatron_that_has_changed_is_left_alone_but_for_lion(environment: Environment, tmp_path: Path) -> None:
    environment.megatron_lion("enable")
    name = "_copy_model_params_to_main_params"
    path = altered(tmp_path / "changed", "optimizer/distrib_optimizer.py", name, "_another_name")
    result = environment.python("-c", ASK, "--optimizer", "lion", *ASK_FLAGS, PYTHONPATH=path)
    assert result.returncode == 1, result.stderr[-3000:]
    warning, error = said(result)
    assert f"has no {name}, which LionDistributedOptimizer overrides" in warning
    assert f"BUILD {REFUSAL}{megatron_version()} " in result.stdout
    assert error.startswith(f"megatron-lion: error: {REFUSAL}{megatron_version()} ")


def test_doctor_says_that_a_plain_script_is_ours_where_the_hook_is_set(environment: Environment) -> None:
    environment.megatron_lion("enable")
    result = environment.python("-m", "megatron_lion.cli", "doctor", MEGATRON_LION_DEVICE="cuda")
    (plain,) = [line for line in result.stdout.splitlines() if line.startswith("  torchrun pretrain_gpt.py ")]
    assert plain.endswith(" megatron-lion, every parameter")


def test_doctor_gives_its_reason_where_the_hook_refuses_to_import_megatron(environment: Environment) -> None:
    environment.megatron_lion("enable")
    result = environment.python("-m", "megatron_lion.cli", "doctor", MEGATRON_LION_DEVICE="gpu")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("NOT READY: MEGATRON_LION_DEVICE 'gpu'"), result.stderr
