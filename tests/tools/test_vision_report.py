"""The report of image runs that are not on the paper's data: one word for a seed, untuned rates, constants."""

import json
from pathlib import Path

import pytest

from tests.tools.test_report_pages import pages
from tools.paper.reporting import vision_findings
from tools.paper.reporting.vision_findings import UNTUNED


def digits_run(
    folder: Path, optimizer: str, l1: float, l2: float, epochs: int = 4, losses: tuple[float, ...] = ()
) -> None:
    """4 of 4 epochs of 10 steps with the same gradient after each, unless ``epochs`` says fewer.

    The loss is ``l2``, unless ``losses`` has that of each epoch; top-1 falls with the loss.
    """
    folder.mkdir(parents=True)
    shared = {"model": "resnet18", "optimizer": optimizer, "lr": 3e-5, "epochs": 4, "data": "digits, 9 images"}
    shared |= {"d": 400, "l1": l1, "l2": l2, "ratio_over_sqrt_d": l1 / l2 / 20}
    lines = [
        shared | {"epoch": epoch, "iteration": 10 * epoch, "loss": loss, "top1": 1 - loss / 10}
        for epoch, loss in enumerate(losses or (l2,) * epochs, start=1)
    ]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_digits_of_100_epochs_are_in_figure_1_and_figure_a3(tmp_path: Path) -> None:
    folder = tmp_path / "vision" / "digits-100"
    digits_run(folder / "resnet18-lion", "lion", 8.0, 2.0)
    digits_run(folder / "resnet18-sgd", "sgd", 9.0, 3.0, epochs=3)
    rows, page, _ = pages(tmp_path, tmp_path / "out", exhibits=("Figure 1", "Figure A3"))
    (curves,), (constants,) = (rows[name].findings for name in ("Figure 1", "Figure A3"))
    for one in (curves, constants):
        assert one.verdict.startswith("The data set is digits, not the paper's.") and one.pictures
        assert one.verdict.endswith(f" {UNTUNED}.") and one.judgements[0].verdict.endswith(f". {UNTUNED}")
    # Constant norms, so the last of the epochs that both have, step 30, decides; sqrt(d) is 20.
    assert constants.tables[0][1][1] == f"{8.0 * 30**0.25 / 20:.4f}" and constants.tables[0][1][4] == "30"
    assert constants.tables[0][2][1] == f"{3.0 * 30**0.25:.4f}" and constants.tables[0][2][-1] == "exact"
    assert "The paper has the mean of five seeds, ours has one." in constants.verdict and "3 epochs" in constants.made
    assert constants.missing == [f"{folder} was cut short: both runs have 3 of 4 epochs"]
    (judgement,) = constants.judgements
    assert judgement.verdict.startswith(
        "not established. The paper has the mean of five seeds"
    )  # the last step decides
    assert "1 seeds" not in page


@pytest.mark.parametrize(
    ("sgd", "words", "numbers"),
    [
        ((3.0, 3.0), "seen", (2, 2)),
        ((3.0, 1.0), "seen in part", (1, 1)),
        ((1.0, 1.0), "not seen", (0, 0)),
    ],
)
def test_a_pair_of_one_seed_has_the_same_words_in_its_section_and_the_summary(
    tmp_path: Path, sgd: tuple[float, ...], words: str, numbers: tuple[int, int]
) -> None:
    folder = tmp_path / "cifar100"
    digits_run(folder / "resnet18-lion", "lion", 8.0, 2.0, losses=(2.0, 2.0))
    digits_run(folder / "resnet18-sgd", "sgd", 9.0, 3.0, losses=sgd)
    found = vision_findings.curves(folder, "")
    lower, higher = numbers
    said = f"{words} in one seed: lower loss after {lower}, higher top-1 after {higher} of 2 epochs."
    assert found.judgements[0].verdict.startswith(said)
    assert found.verdict.startswith(f"{words[0].upper()}{words[1:]} in one seed for resnet18: ")
    assert UNTUNED not in found.verdict + found.judgements[0].verdict, "the paper's own data and rates"


def test_constants_of_one_optimizer_are_not_established(tmp_path: Path) -> None:
    digits_run(tmp_path / "vision" / "digits-100" / "resnet18-lion", "lion", 8.0, 2.0)
    rows, _, text = pages(tmp_path, tmp_path / "out", exhibits=("Figure A3",))
    assert "not the paper's. Not established: resnet18 with both optimizers is needed." in text
    assert not rows["Figure A3"].was_run


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name, norm in (("lion", 2.0), ("sgd", 3.0)):
        digits_run(tmp_path / "vision" / "digits-100" / f"resnet18-{name}", name, 4 * norm, norm)
    made = []
    for _ in range(2):
        pages(tmp_path, tmp_path / "out", exhibits=("Figure A3",))
        made.append({path.name: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*.*"))})
    assert made[0] == made[1] and len(made[0]) == 3
