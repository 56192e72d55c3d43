"""tools/watch.py: a finished run, one that goes on while it is watched, one that is only in TensorBoard's events."""

import json
import threading
import time
from pathlib import Path

import pytest
import watch

from megatron_lion.config import LionError

STEP = (
    " [2026-11-24 20:00:00] iteration {:8d}/{:8d} | consumed samples: 16 | elapsed time per iteration (ms): 50.0 |"
    " learning rate: 1.0E-03 | global batch size: 16 | lm loss: {:.6E} | loss scale: 1.0 | grad norm: 1.0 |\n"
)


def log(folder: Path, last: int, total: int) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [STEP.format(step, total, 7.0 - step / 10) for step in range(1, last + 1)]
    if last >= 4:
        lines.append(" validation loss at iteration 4 | lm loss value: 6.700000E+00 | lm loss PPL: 8.1E+02 |\n")
    (folder / "log.txt").write_text("".join(lines))
    return folder


def rounds(folder: Path) -> None:
    record = {"iteration": 2, "converged": True, "loss": 6.8, "ratio": 70.0, "ratio_over_sqrt_d": 0.7, "d": 10_000}
    (folder / "norm_ratio.jsonl").write_text(json.dumps(record) + "\n" + '{"iteration": 4, "conv')  # being written


def main(figure: Path, *runs: str, every: float = 0.0) -> int:
    flags = [word for run in runs for word in ("--run", run)]
    return watch.main([*flags, "--figure", str(figure), "--every", str(every)])


def test_a_finished_run_is_drawn_with_its_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds(log(tmp_path / "run", 5, 5))
    assert main(tmp_path / "a.svg", f"Lion={tmp_path}/run") == 0
    drawn = (tmp_path / "a.svg").read_text()
    for text in ("Lion: 5 of 5, loss 6.5000", "Lion, training", "Lion, validation", "d = 10,000", 'id="axes_2"'):
        assert text in drawn, text
    assert capsys.readouterr().out == "Lion: 5 of 5, loss 6.5000\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "run"]


def test_a_run_without_rounds_has_one_panel_and_two_runs_have_one_figure(tmp_path: Path) -> None:
    log(tmp_path / "one", 5, 5), log(tmp_path / "two", 3, 5)
    assert main(tmp_path / "a.svg", f"Lion={tmp_path}/one", f"SGD={tmp_path}/two") == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert 'id="axes_2"' not in drawn
    assert "SGD: 3 of 5" in drawn and "SGD, training" in drawn and "SGD, validation" not in drawn


def test_a_run_that_goes_on_is_drawn_again_until_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("importing\n")
    watching = threading.Thread(target=main, args=(tmp_path / "a.svg", f"Lion={folder}"), kwargs={"every": 0.02})
    watching.start()
    seen = ""
    for last in (2, 5):
        log(folder, last, 5)
        deadline = time.monotonic() + 60
        while f"Lion: {last} of 5" not in seen and time.monotonic() < deadline:
            time.sleep(0.02)
            seen += capsys.readouterr().out
        assert f"Lion: {last} of 5" in seen
    watching.join(timeout=60)
    assert not watching.is_alive()
    assert "Lion: 5 of 5" in (tmp_path / "a.svg").read_text()


def test_without_a_log_the_events_are_read(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run" / "tensorboard")) as writer:
        for step in range(1, 2001):
            writer.add_scalar("lm loss", 7.0 - step / 1000, step)
        writer.add_scalar("lm loss validation", 6.5, 1000)
    read, found = watch.read_run(tmp_path / "run")
    assert read is not None and found == []
    assert sorted(read.loss) == list(range(1, 2001)), "every point, none sampled away"
    assert read.loss[2000] == pytest.approx(5.0) and read.validation == {1000: 6.5}
    assert main(tmp_path / "a.png", f"Lion={tmp_path}/run") == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_what_is_no_run_and_one_that_has_not_begun_are_named(tmp_path: Path) -> None:
    with pytest.raises(LionError, match=r"none has neither log\.txt nor tensorboard"):
        main(tmp_path / "a.svg", f"Lion={tmp_path}/none")
    (tmp_path / "log.txt").write_text("importing\n")
    with pytest.raises(LionError, match=r"no loss yet in .*: wait, or use --every"):
        main(tmp_path / "a.svg", f"Lion={tmp_path}")
    with pytest.raises(LionError, match="two runs have the same name"):
        main(tmp_path / "a.svg", f"Lion={tmp_path}", f"Lion={tmp_path}")
    assert not (tmp_path / "a.svg").exists()
