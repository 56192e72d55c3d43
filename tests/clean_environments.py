"""Installs as users make them, each in a clean virtual environment: which Lion ran, and what was said.

    python -m tests.clean_environments docs/results/clean-environments.md

An environment sees the packages of the one that runs this file, but for those that are installed in the test. Training
is two iterations of a tiny GPT on the CPU. Needs a package index for the rows that fetch something.
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import versions
from tests.harness import BATCH, MODEL, PRETRAIN_GPT, RATE, ROOT

OTHER_RELEASE = "0.18.2"
IMAGE_TORCH = "2.6.0a0+ecf3bae40a.nv25.1"  # as a container image calls its own build
COPIED = ("megatron_lion", "launch", "configs", "containers", "pyproject.toml", "setup.py", "README.md", "LICENSE")
HIDDEN = re.compile(r"megatron|__editable__|setuptools|pkg_resources|_distutils_hack|wheel|pip\b|pip-|.*\.pth$")
MEGATRON = re.compile(r"megatron$|megatron_core-")
TRAIN = f"{MODEL} {BATCH} {RATE} --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --train-iters 2"
HEAD = """# Clean environments

Installs in clean virtual environments, by `python -m tests.clean_environments` ({when}). Shown are the
commands, and the lines of their output that say which Megatron and which Lion ran. The flags of the tiny GPT are left
out.
"""
# What the page shows of an output.
SHOWN = re.compile(
    r"^(usage: |  WARNING: Building wheel|recipe |torch  |megatron-core  |  not used|READY|NOT READY|"
    r"megatron-lion: (?!MEGATRON_LION_DEVICE)|megatron-lion \w+abled|Successfully (un)?installed)"
)


@dataclass
class Clean:
    """A virtual environment with this project's source next to it; records the commands and what they said."""

    folder: Path
    has_megatron: bool = True
    torch: str | None = None  # what the installed torch is said to be: an image's own build, which needs nothing
    variables: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    record: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source, self.environment = self.folder / "megatron-lion", self.folder / "env"
        self.source.mkdir(parents=True)
        for name in COPIED:
            path = ROOT / name
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, self.source / name)
        subprocess.run([sys.executable, "-m", "venv", self.environment], check=True)
        packages = self.folder / "packages"
        packages.mkdir()
        for installed in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
            for entry in installed.iterdir():
                wanted = self.has_megatron if MEGATRON.match(entry.name) else not HIDDEN.match(entry.name)
                if wanted and not (packages / entry.name).exists():
                    (packages / entry.name).symlink_to(entry)
        if self.torch:
            (metadata,) = packages.glob("torch-*.dist-info")
            metadata.unlink()
            metadata = packages / f"torch-{self.torch}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {self.torch}\n")
        (self.site_packages / "packages.pth").write_text(f"{packages}\n")
        self.bin = self.environment / "bin"
        self.start_with(self.bin / "python")
        self.script = self.checkout(self.folder / "scripts")

    @property
    def site_packages(self) -> Path:
        return next(self.environment.glob("lib/python*/site-packages"))

    def start_with(self, python: Path) -> None:
        """Let ``python`` and ``torchrun`` be this interpreter's."""
        self.bin.mkdir(exist_ok=True)
        for name, words in (("python", ""), ("torchrun", " -m torch.distributed.run")):
            path = self.bin / name
            if path != python:
                path.write_text(f'#!/bin/sh\nexec {python}{words} "$@"\n')
                path.chmod(0o755)

    def checkout(self, folder: Path, megatron: Path | None = None) -> Path:
        """A training script that does not name us, in a folder that may have a Megatron too."""
        folder.mkdir()
        script = folder / "pretrain_gpt.py"
        script.write_text("import runpy\nrunpy.run_path(__file__ + '.body', run_name='__main__')\n")
        nothing = "import megatron_lion\nmegatron_lion.register = lambda: None\n"
        Path(f"{script}.body").write_text(nothing + PRETRAIN_GPT.read_text())
        if megatron:
            (folder / "megatron").symlink_to(megatron / "megatron")
        return script

    def run(self, line: str, status: int | None = 0) -> str:
        """Run a line of shell as a user of the environment would; returns and records what it printed."""
        path = self.variables.get("PATH", os.environ["PATH"])
        inherited = {"TMPDIR", "LANG", "HOME", "SSL_CERT_FILE"} | {
            name for name in os.environ if name.startswith("PIP_")
        }
        variables = {name: os.environ[name] for name in inherited if name in os.environ}
        variables |= {"MEGATRON_LION_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        variables |= {"XDG_CACHE_HOME": str(self.folder / "cache"), **self.variables}
        variables = {name: value for name, value in variables.items() if value}
        variables["PATH"] = f"{self.bin}:{path}"
        done = subprocess.run(
            [*self.prefix, "/bin/sh", "-c", line],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            cwd=self.folder,
            env=variables,
        )
        self.record.append((line, done.stdout))
        assert status is None or done.returncode == status, f"{line}\n{done.stdout[-5000:]}"
        return done.stdout

    def doctor(self, script: Path | None = None, status: int = 0) -> str:
        """Returns the report of ``megatron-lion doctor SCRIPT``."""
        return self.run(f"megatron-lion doctor {script or self.script} --optimizer lion", status)

    def train(self, script: Path | None = None, *, start: str = "-m megatron_lion.run ") -> str:
        """Returns the log of a run with two iterations."""
        log = self.run(
            f"torchrun --standalone --nproc-per-node 1 {start}{script or self.script} {TRAIN} --optimizer lion"
        )
        assert "iteration        2/       2" in log, log[-3000:]
        return log


OURS = "megatron-lion: lion on 28 of 28 parameters"


def wheel(folder: Path) -> Clean:
    """The wheel, in an environment that has its dependencies."""
    clean = Clean(folder)
    clean.run(
        "pip install -q setuptools wheel && pip wheel -q --no-deps --no-build-isolation -w wheels ./megatron-lion"
    )
    clean.run("pip install wheels/*.whl")
    assert "READY" in clean.doctor() and OURS in clean.train()
    clean.run("megatron-lion enable")
    assert OURS in clean.train(start="")
    clean.run("megatron-lion disable && pip uninstall -y megatron-lion")
    assert not list(clean.site_packages.glob("megatron_lion*"))
    return clean


def checkout_beside_wheel(folder: Path) -> Clean:
    """A checkout of one release, with the wheel of another in site-packages."""
    clean = Clean(folder)
    script = clean.checkout(folder / "Megatron-LM", versions.wheel(OTHER_RELEASE))
    clean.run("pip install -q setuptools && pip install -q --no-build-isolation ./megatron-lion")
    report = clean.doctor(script)
    assert f"{OTHER_RELEASE} ({script.parent}" in report and "not used" in report
    assert OURS in clean.train(script)
    clean.variables["PYTHONPATH"] = str(script.parent)  # the same for a script that is elsewhere
    assert f"{OTHER_RELEASE} ({script.parent}" in clean.doctor()
    return clean


def old_setuptools(folder: Path) -> Clean:
    """Plain `pip install .` where constraints pin setuptools 70, as some images do. No Megatron is fetched."""
    clean = Clean(folder, has_megatron=False, torch=IMAGE_TORCH)
    (folder / "constraints.txt").write_text("setuptools==70.0.0\n")
    clean.variables["PIP_CONSTRAINT"] = str(folder / "constraints.txt")
    clean.run("pip install -q setuptools")  # which the image has, at the constraint's version
    clean.run("pip install ./megatron-lion")
    report = clean.doctor(status=1)
    assert "megatron-core is not installed" in report and IMAGE_TORCH in report
    script = clean.checkout(folder / "Megatron-LM", versions.wheel(OTHER_RELEASE))
    assert "READY" in clean.doctor(script)
    return clean


def read_only(folder: Path) -> Clean:
    """A read-only image with the package in it, then one without: an overlay on PYTHONPATH."""
    clean = Clean(folder)
    clean.run("pip install -q setuptools && pip install -q --no-build-isolation ./megatron-lion")
    clean.prefix = read_only_mount(clean.environment)
    said = clean.run("megatron-lion enable", status=2)
    assert "Read-only file system. Use `torchrun -m megatron_lion.run SCRIPT` instead" in said
    assert OURS in clean.train()
    clean.prefix = []
    clean.run("pip uninstall -q -y megatron-lion")
    clean.prefix = read_only_mount(clean.environment)
    clean.run("pip install -q --no-deps --no-build-isolation --target overlay ./megatron-lion")
    clean.variables["PYTHONPATH"] = str(folder / "overlay")
    assert "READY" in clean.run(f"python -m megatron_lion.cli doctor {clean.script} --optimizer lion")
    assert OURS in clean.train()
    return clean


def no_home(folder: Path) -> Clean:
    """No HOME, then a HOME that is read-only."""
    clean = Clean(folder)
    clean.variables |= {"HOME": "", "XDG_CACHE_HOME": ""}
    all_commands(clean)
    home = folder / "home"
    home.mkdir()
    clean.variables["HOME"] = str(home)
    clean.prefix = read_only_mount(home)
    if os.geteuid() == 0:  # only root's pip takes a cache that it cannot write
        clean.run("pip install -q setuptools && pip install --no-build-isolation ./megatron-lion", status=1)
    assert "kernel fused (compiled for this run only: [Errno 30] Read-only file system" in all_commands(clean)
    return clean


def no_user(folder: Path) -> Clean:
    """No HOME and no entry in passwd, as in a container that runs under a foreign user."""
    clean = Clean(folder)
    clean.variables |= {"HOME": "", "XDG_CACHE_HOME": ""}
    # Without nsswitch.conf, systemd does not answer for root instead of passwd.
    clean.prefix = mounted("mount --bind /dev/null /etc/passwd && mount --bind /dev/null /etc/nsswitch.conf")
    assert "kernel fused (compiled for this run only: this user has no home folder" in all_commands(clean)
    return clean


def all_commands(clean: Clean) -> str:
    """Every command that a first user types, from the installation to the removal. Returns the log of the training."""
    clean.run("pip install -q setuptools && pip install --no-cache-dir --no-build-isolation ./megatron-lion")
    assert "READY" in clean.doctor()
    assert "usage: megatron-lion rehearse" in clean.run("megatron-lion rehearse --help")
    assert "--lion-gather" in clean.run("python megatron-lion/launch/pretrain_gpt.py --help")
    clean.run("python megatron-lion/launch/launch.py llama_7b lion h100x32 --dry-run")
    log = clean.train()
    assert OURS in log
    clean.run("megatron-lion enable")
    assert OURS in clean.train(start="")
    clean.run("megatron-lion disable && pip uninstall -y megatron-lion")
    return log


def no_compiler(folder: Path) -> Clean:
    """No C++ compiler on PATH."""
    clean = Clean(folder)
    clean.run("pip install -q setuptools && pip install -q --no-build-isolation ./megatron-lion")
    clean.variables["PATH"] = str(folder / "nothing")
    assert "READY" in clean.doctor()
    assert "kernel foreach (no C++ compiler on PATH" in clean.train()
    return clean


def user_site(folder: Path) -> Clean:
    """`pip install --user` with a Python whose site-packages is read-only."""
    clean = Clean(folder)
    python, home = Path(sys.base_prefix) / "bin" / "python3", folder / "home"
    site_packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    clean.bin = folder / "bin"
    clean.start_with(python)
    clean.variables |= {"PYTHONUSERBASE": str(home), "PYTHONPATH": str(folder / "packages")}
    clean.variables["PATH"] = f"{home / 'bin'}:{os.environ['PATH']}"
    clean.prefix = read_only_mount(Path(site_packages))
    clean.run("python -m pip install --user ./megatron-lion")
    assert "READY" in clean.doctor()
    assert f"({home}" in clean.run("megatron-lion enable")
    assert OURS in clean.train(start="")
    clean.run("megatron-lion disable")
    return clean


def container(folder: Path) -> Clean:
    """The install line of the Dockerfile and of the Apptainer definition."""
    clean = Clean(folder, has_megatron=False)
    clean.run("pip install -q setuptools==70.3.0")  # what the image has
    (line,) = re.findall(r"^RUN (.*)$", (ROOT / "containers" / "Dockerfile").read_text(), re.MULTILINE)
    clean.variables["MEGATRON"] = "megatron-core==0.19.2"
    clean.run(f"cd megatron-lion && {line}")
    assert "READY" in clean.doctor() and OURS in clean.train()
    return clean


def broken_resiliency_extension(folder: Path) -> Clean:
    """nvidia-resiliency-ext 0.4.1 next to megatron-core 0.19.2."""
    clean = Clean(folder)
    clean.run("pip install -q setuptools && pip install -q --no-build-isolation ./megatron-lion")
    clean.run("pip install -q --no-deps nvidia-resiliency-ext==0.4.1")
    assert "NOT READY" in clean.doctor(status=1)
    clean.run("pip uninstall -q -y nvidia-resiliency-ext")
    assert "NOT READY" in clean.doctor(status=1)  # pip has left an empty folder, which is a package for Python
    folder = clean.site_packages.relative_to(clean.folder) / "nvidia_resiliency_ext"
    clean.run(f"rmdir {folder}")
    assert "READY" in clean.doctor()
    return clean


ROWS: dict[str, Callable[[Path], Clean]] = {
    "wheel; enable, disable, uninstall": wheel,
    "a checkout next to another release's wheel": checkout_beside_wheel,
    "setuptools 70 under PIP_CONSTRAINT": old_setuptools,
    "read-only site-packages": read_only,
    "pip install --user": user_site,
    "no HOME": no_home,
    "no HOME, no user": no_user,
    "no compiler": no_compiler,
    "containers/install.sh": container,
    "nvidia-resiliency-ext 0.4.1": broken_resiliency_extension,
}


def mounted(script: str) -> list[str]:
    """A prefix that runs a command where ``script`` has changed the mounts."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", *user, "/bin/sh", "-c", f'{script} && exec "$@"', "sh"]


def read_only_mount(folder: Path) -> list[str]:
    """A prefix that runs a command with ``folder`` read-only."""
    return mounted(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}")


def can_mount() -> bool:
    """Whether this machine lets us change mounts in a namespace."""
    return subprocess.run([*mounted("true"), "true"], capture_output=True, check=False).returncode == 0


def section(name: str, clean: Clean) -> str:
    """The row as Markdown: each command, and the lines of its output that matter."""
    lines = []
    for command, output in clean.record:
        lines.append(f"$ {shorter(command, clean)}")
        lines += [f"  {shorter(line, clean)}" for line in output.splitlines() if SHOWN.match(line)]
    return f"## {name}\n\n{ROWS[name].__doc__}\n\n```\n" + "\n".join(lines) + "\n```\n"


def shorter(text: str, clean: Clean) -> str:
    """``text`` without this machine's folders and the training flags."""
    text = text.replace(f" {TRAIN}", " ...").replace(f"{clean.folder}/", "").replace(sys.base_prefix, "PYTHON")
    return re.sub(r"/\S*/site-packages", ".../site-packages", text)


def main(page: Path) -> None:
    """Make every row, and write the page."""
    texts = []
    for name, make in ROWS.items():
        with tempfile.TemporaryDirectory(prefix="clean-") as folder:
            texts.append(section(name, make(Path(folder) / "user")))
        print(name, flush=True)
    when = f"{datetime.date.today().isoformat()}, Python {sys.version.split()[0]}, CPU"
    page.write_text("\n".join([HEAD.format(when=when), *texts]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
