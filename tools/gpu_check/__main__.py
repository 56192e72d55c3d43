"""Run the check; tools/gpu_check.sh is how to start it.

python -m tools.gpu_check --out FOLDER [--wheels FOLDER] [--device cuda] [--parts NAME...]
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from tools.gpu_check import records, summary
from tools.gpu_check.parts import ENVIRONMENT, REHEARSAL_SECONDS, SECONDS, SITE, Part, all_parts
from tools.gpu_check.runner import ROOT, Outcome, run_all

SHOWN_LINES = 3  # of each part on the terminal


def environment(on_gpu: bool, work: Path) -> dict[str, str]:
    """The parts' environment: this checkout first, then the wheels, caches in ``work``, no network."""
    paths = [str(ROOT), str(ROOT / "launch"), str(work / SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    made = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "XDG_CACHE_HOME": str(work / "cache"),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        # What Megatron's --deterministic-mode asks for.
        "NCCL_ALGO": "Ring",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    made.pop("MEGATRON_LION_DEVICE", None)
    made.pop("TRITON_INTERPRET", None)
    made.pop("GPU_CHECK_DEVICE", None)
    if not on_gpu:
        made |= {"MEGATRON_LION_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        made["GPU_CHECK_DEVICE"] = "cpu"  # for tests/test_gpu.py
    return made


def chosen(parts: list[Part], names: list[str] | None) -> list[Part]:
    """The parts that come before all checks and those that are named; without names, all of them."""
    known = [part.name for part in parts]
    for name in names or ():
        if name not in known:
            raise SystemExit(f"gpu_check: unknown part {name!r}; the parts are {', '.join(known)}")
    return [part for part in parts if not names or part.name in ("wheels", ENVIRONMENT, *names)]


def main() -> int:
    """Exit status 0 only if every part passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for summary.md, rows.jsonl and log.txt")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, for this check only")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these parts")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the running part is ended
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        parts = chosen(all_parts(on_gpu, work, rows, args.wheels), args.parts)
        seconds = SECONDS * (1 if on_gpu else REHEARSAL_SECONDS)
        print(f"{len(parts)} parts, at most {seconds / 60:.0f} minutes in all", flush=True)
        for outcome in run_all(parts, work, environment(on_gpu, work), seconds):
            outcomes.append(outcome)
            records.append(rows, part=outcome.part.name, result=outcome.result, seconds=round(outcome.seconds, 1))
            summary.write(out, outcomes, len(parts), rehearsal=not on_gpu, root=ROOT)
            print(f"== {outcome.part.name}: {outcome.result} ({outcome.seconds:.0f} s)", flush=True)
            printed = summary.tail(outcome).splitlines()
            missing = [line for line in printed if line.startswith("missing:")]
            for line in missing or printed[-SHOWN_LINES:]:
                print(f"   {line}" if missing else f"   {line[:200]}", flush=True)
    passed = sum(outcome.passed for outcome in outcomes)
    if len(outcomes) < len(parts):
        print("nothing can be checked here", file=sys.stderr)
    print(f"{passed} of {len(parts)} parts passed; see {out}/summary.md")
    return int(passed < len(parts))


if __name__ == "__main__":
    sys.exit(main())
