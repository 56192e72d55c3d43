"""toy_convergence.py: its problem is the paper's, its Lion is the package's, its checks bite, its run says so."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lion.config import LionError
from megatron_lion.lion import Lion
from tools.paper import toy_convergence as toy
from tools.paper import toy_figures

BOX = toy.Case(start=(10.0, -7.3), constrained=True, weight_decay=0.1, lr=0.05)
FREE = toy.Case(start=(3.1, 6.4), constrained=False, weight_decay=0.05, lr=0.02, beta1=0.8, beta2=0.95)


def test_the_problem_has_the_papers_gradient_smoothness_and_minima() -> None:
    points = (
        20 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 10
    ).requires_grad_()
    (autograd,) = torch.autograd.grad(toy.value(points).sum(), points)
    torch.testing.assert_close(toy.gradient(points.detach()), autograd, rtol=1e-13, atol=1e-13)
    hessians = [torch.autograd.functional.hessian(toy.value, point) for point in points.detach()[:50]]
    assert torch.linalg.eigvalsh(torch.stack(hessians)).abs().max() <= toy.SMOOTHNESS
    assert (
        torch.linalg.eigvalsh(torch.autograd.functional.hessian(toy.value, torch.tensor([math.pi, 0.0]))).max() == 7.0
    )

    t, lowest = toy.minimum()
    assert (round(t, 3), round(lowest, 3)) == (2.125, 1.884)
    for x, y in ((0, t), (0, -t), (t, 0), (-t, 0)):
        point = torch.tensor([x, y], dtype=torch.float64)
        assert toy.gradient(point).abs().max() < 1e-14
        assert float(toy.value(point)) == pytest.approx(lowest, rel=1e-15)
    grid = torch.cartesian_prod(*[torch.linspace(-10, 10, 801, dtype=torch.float64)] * 2)
    assert lowest <= float(toy.value(grid).min()) < lowest + 1e-3


@pytest.mark.parametrize("momentum_init", ["gradient", "zero"])
def test_each_run_is_the_packages_lion_whatever_runs_beside_it(momentum_init: str) -> None:
    """A run of ``Lion`` alone with the noise of its row: one other sign would show in every mean after it."""
    cases, repeats, steps, seed = [BOX, FREE, replace(BOX, start=(10.0, 2.0), beta2=0.9)], 2, 400, 5
    outcome = toy.simulate(cases, repeats=repeats, steps=steps, seed=seed, momentum_init=momentum_init)
    noise = torch.randn(steps, 6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, case in enumerate(cases):
        means, largest = torch.zeros(steps, dtype=torch.float64), 0.0
        for repeat in range(repeats):
            theta = torch.nn.Parameter(torch.tensor(case.start, dtype=torch.float64))
            settings = {"lr": case.lr, "betas": (case.beta1, case.beta2), "weight_decay": case.weight_decay}
            lion = Lion([theta], **settings, momentum_init=momentum_init)
            total = 0.0
            for k in range(steps):
                exact = toy.gradient(theta.detach())
                inner = (
                    case.weight_decay * float(exact @ theta.detach())
                    if case.constrained
                    else -float(exact.abs().sum()) / 2
                )
                total += float(exact.abs().sum()) + inner
                means[k] += total / (k + 1) / repeats
                largest = max(largest, float(theta.detach().abs().max()))
                theta.grad = exact + noise[k, row * repeats + repeat]
                lion.step()
        torch.testing.assert_close(outcome.left[row], means, rtol=1e-12, atol=0.0)
        assert float(outcome.linf[row]) == largest


def test_the_right_side_is_the_corollarys() -> None:
    gap = 10.0**2 + 7.3**2 + 5 * math.cos(10.0) * math.cos(7.3) - toy.minimum()[1]
    expected = [15 * math.sqrt(2) * (2 * 7 * gap) ** 0.25 / k**0.25 for k in range(1, 51)]
    assert toy.right_sides([BOX], 50)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_an_iterate_that_leaves_the_box_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = toy.lion_step

    def ascend(theta, grad, exp_avg, **settings):
        return stock(theta, -grad, exp_avg, **{**settings, "weight_decay": 0.0})

    monkeypatch.setattr(toy, "lion_step", ascend)
    with pytest.raises(LionError, match=r"constrained=True.*outside the box 1/lambda = 10"):
        toy.simulate([BOX], repeats=2, steps=20, seed=0, momentum_init="zero")


def test_a_residual_below_zero_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.theory, "kkt_residual", lambda grad, theta, decay, dim: -grad.abs().sum(dim))
    with pytest.raises(LionError, match="has the KKT residual -"):
        toy.simulate([BOX], repeats=1, steps=3, seed=0)


def test_a_weight_decay_that_the_iterates_are_too_large_for_is_named() -> None:
    with pytest.raises(LionError, match=r"constrained=False.*needs lambda <= 1/\(2C\) = 0.078125"):
        toy.simulate([replace(FREE, weight_decay=0.1)], repeats=1, steps=5, seed=0)


def test_a_run_too_short_for_the_corollary_is_refused() -> None:
    with pytest.raises(LionError, match=r"below max.*take K >="):
        toy.corollary_cases([BOX], 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, with fewer lengths of runs so that it takes seconds."""
    folder = tmp_path_factory.mktemp("toy") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tools/paper/toy_convergence.py", "--output", str(folder)])
        patch.setattr(toy, "COROLLARY_STEPS", (1000, 2000, 4000))
        toy.main()
    return folder


def test_with_the_corollarys_own_settings_the_left_side_stays_under_and_falls_like_the_right(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for name in ("constrained", "unconstrained"):
        found = result[name]["corollary"]
        assert [row["steps"] for row in found["rows"]] == [1000, 2000, 4000]
        assert max(row["largest_share"] for row in found["rows"]) < 1.0
        assert found["slope"] == pytest.approx(-0.25, abs=0.02)
        assert found["slope_low"] < found["slope"] < found["slope_high"]


def test_the_result_says_where_the_papers_settings_exceed_the_bound(run: Path) -> None:
    """From the corner of the box the first hundred steps are alike whatever the noise, and above the bound."""
    result = json.loads((run / "result.json").read_text())
    corner = result["constrained"]["paper"]["corner"]
    assert (corner["over_from"], corner["at"]) == (23, 122)
    assert corner["largest"] == pytest.approx(1.494, abs=0.002)
    text = (run / "result.md").read_text()
    assert "start in the corner (10, 10): left / right is at most 1.494 (k = 122), above the right side" in text
    for name in ("constrained", "unconstrained"):
        paper = result[name]["paper"]
        assert len(paper["left"]) == len(paper["right"]) == 2000
        share = [left / right for left, right in zip(paper["left"], paper["right"], strict=True)]
        assert paper["averaged"]["largest"] == pytest.approx(max(share))
        assert paper["averaged"]["at_the_end"] == pytest.approx(share[-1])
        for k in (1, 200, 2000):
            half = paper["left_half_width"][k - 1] / paper["right"][k - 1]
            assert f"| {share[k - 1] - half:.3f} to {share[k - 1] + half:.3f} |" in text
            assert f"| {k} | {paper['left'][k - 1]:.3f} | {paper['right'][k - 1]:.3f} | {share[k - 1]:.3f} |" in text
    assert len(result["constrained"]["grid"]) == len(toy.GRID_LR) * len(toy.GRID_BOX_DECAY)


def test_the_figures_are_vectors_and_the_same_result_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    again = toy_figures.draw(result, toy.value, tmp_path, "svg")
    names = {path.name for path in again}
    assert {"A1a_surface.svg", "A1b_contours.svg", "A2a_constrained.svg", "A2b_unconstrained.svg"} < names
    for path in again:
        assert path.read_bytes() == (run / path.name).read_bytes()
        assert b"<path" in path.read_bytes()
        assert b"<image" not in path.read_bytes()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_starts_that_is_none_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["toy", "--output", str(tmp_path / "out"), f"--starts={value}"])
    with pytest.raises(SystemExit):
        toy.main()
    assert f"'{value}' is not a whole number >= 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
