"""Every figure and table of Dong, Li, Lin (2025): what it shows, what it claims, and which command makes ours.

Formulas are in ``$...$``, as :mod:`tools.paper.reporting.formulas` reads them.
"""

from dataclasses import dataclass

Table = list[list[str]]  # the first row is the head


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A figure or a table of the paper."""

    name: str
    title: str
    shows: str
    """the layout, setting and numbers of the paper's own; its pictures are not reproduced"""
    claim: str
    command: str
    """makes ours"""
    table: Table | None = None


VISION = "python -m tools.paper.vision_study --dataset {0} --data DIR --output runs/vision/{0}"
LANGUAGE = (
    "for o in lion_paper sgd_paper; do python launch/launch.py {0} $o a100x16; "
    "python launch/launch.py {1} $o a100x16; done"
)
NORM_RATIO = r"$r = \Vert \nabla f \Vert_1 / \Vert \nabla f \Vert_2$"
RATIO = r"LION is better throughout, and $r = \Theta(\sqrt{d})$."

LOG_PERPLEXITY: Table = [
    ["model", "optimizer", "10k", "20k", "30k", "40k", "50k"],
    ["GPT-2 Small", "SGD", "8.202", "8.005", "7.922", "7.892", "7.887"],
    ["GPT-2 Small", "LION", "3.659", "3.409", "3.326", "3.293", "3.284"],
    ["GPT-2 Medium", "SGD", "8.029", "7.807", "7.737", "7.715", "7.712"],
    ["GPT-2 Medium", "LION", "3.221", "3.004", "2.918", "2.882", "2.876"],
]
L1, L2 = r"$\ell_1$", r"$\ell_2$"
PLAIN_RATE, LOG_RATE = r"$O(K^{-1/4})$", r"$O(\mathrm{polylog}(K) K^{-1/4})$"
ROOT_RATE = r"$O(\sqrt{d} K^{-1/4})$"
RATES: Table = [
    ["optimizer", "work", "norm", "rate", "bound met in $K$", "best in $d$"],
    ["SGD", "Bottou et al.", L2, PLAIN_RATE, "yes", "yes"],
    ["AdaGrad", "Wang et al., Liu et al.", L2, LOG_RATE, "no", "?"],
    ["AdaGrad", "Hong et al.", L2, r"$O(\sqrt{d} \mathrm{polylog}(K) K^{-1/4})$", "no", "?"],
    ["RMSProp", "Shi et al.", r"$\min(\ell_1, c \ell_2)$", LOG_RATE, "no", "?"],
    ["RMSProp", "Zou et al.", L2, LOG_RATE, "no", "?"],
    ["RMSProp", "Li et al.", L1, ROOT_RATE, "yes", "yes"],
    ["Adam", "Zhang et al.", r"$\min(\ell_2, c \ell_2^2)$", LOG_RATE, "no", "?"],
    ["Adam", "Zou et al., Wang et al.", L2, LOG_RATE, "no", "?"],
    ["SignSGD", "Bernstein et al.", L1, PLAIN_RATE, "yes", "?"],
    ["SignSGD", "Sun et al.", L1, "$O(d K^{-1/4})$", "yes", "no"],
    ["SignSGD-EF", "Karimireddy et al.", L2, PLAIN_RATE, "yes", "?"],
    ["SignSGD-CF", "Safaryan et al.", L1, PLAIN_RATE, "yes", "?"],
    ["LION", "this paper", L1, ROOT_RATE, "yes", "yes"],
]
RATES_FOUND: Table = [
    ["model", "CIFAR-10 (LION / SGD)", "CIFAR-100 (LION / SGD)"],
    ["ResNet18", "3e-6 / 1e-6", "3e-5 / 3e-4"],
    ["ResNet50", "3e-6 / 3e-6", "3e-5 / 1e-4"],
    ["ViT-S", "1e-6 / 1e-6", "1e-6 / 1e-6"],
]


def _two_columns(measure: str, setting: str) -> str:
    return f"Left: mean training loss and {measure}, LION against SGD. Right: {NORM_RATIO} over training. {setting}"


def _vision(name: str, title: str, dataset: str, setting: str) -> Exhibit:
    return Exhibit(
        name=name,
        title=f"ResNet18, ResNet50 and ViT-S on {title}",
        shows=_two_columns("top-1 accuracy", setting),
        claim=RATIO,
        command=VISION.format(dataset),
    )


CIFAR = "100 epochs, batches of 64, cosine annealing, exact gradient over the whole training set after each epoch."
OPENWEBTEXT = "OpenWebText, 50,000 steps of 640 sequences, rounds of 100 batches, 16 A100."
EXHIBITS = (
    Exhibit(
        name="Table 1",
        title="Convergence rates of stochastic methods",
        shows="Rates by optimizer, the norm that they are in, and whether they are the best known in $K$ and $d$.",
        claim=r"LION's $\ell_1$ norm falls as $\sqrt{d} K^{-1/4}$.",
        command="python -m tools.paper.toy_convergence --output runs/toy",
        table=RATES,
    ),
    _vision("Figure 1", "CIFAR-100", "cifar100", CIFAR),
    Exhibit(
        name="Figure 2",
        title="BERT-Small and BERT-Base",
        shows=_two_columns("test loss", f"Masked words and sentence order. {OPENWEBTEXT}"),
        claim=RATIO,
        command=LANGUAGE.format("bert_small", "bert_base"),
    ),
    Exhibit(
        name="Figure 3",
        title="GPT-2 Small and GPT-2 Medium",
        shows=_two_columns("test loss", OPENWEBTEXT),
        claim=RATIO,
        command=LANGUAGE.format("gpt2_small", "gpt2_medium"),
    ),
    Exhibit(
        name="Figure A1",
        title="The toy problem's surface and contours",
        shows=r"$f = \theta_1^2 + \theta_2^2 + 5 \cos(\theta_1) \cos(\theta_2)$ as a surface (a) and as contours (b).",
        claim=r"$L = 7$; minima at $(0, \pm 2.125)$ and $(\pm 2.125, 0)$ with $f^* = 1.884$.",
        command="python -m tools.paper.toy_convergence --output runs/toy",
    ),
    Exhibit(
        name="Figure A2",
        title="LION on the toy problem against the bound",
        shows="Left side of (9) and of (13) (solid) against the right side (dashed) over $k$, in the box (a) and "
        r"without it (b); $\eta = 0.01$, $K = 2000$, 5 starts x 5 repeats.",
        claim=r"The measured left sides agree with the theory's rate, for other $\eta$ and $\lambda$ too.",
        command="python -m tools.paper.toy_convergence --output runs/toy",
    ),
    Exhibit(
        name="Figure A3",
        title="The constants of the rates",
        shows=r"Running mean of the $\ell_1$ norm with LION (a) and of the $\ell_2$ norm with SGD (b) against the "
        r"smallest constant times the rate, $c_{\mathrm{LION}} \sqrt{d} K^{-1/4}$ and $c_{\mathrm{SGD}} K^{-1/4}$. "
        r"ResNet18 on CIFAR-100, mean of 5 runs: $c_{\mathrm{LION}} = 0.701$, $c_{\mathrm{SGD}} = 1.365$.",
        claim=r"$c_{\mathrm{LION}} < c_{\mathrm{SGD}}$.",
        command="python -m tools.paper.rate_constants --evaluate wiki.test.tokens --output runs/rates",
    ),
    _vision("Figure A4", "CIFAR-10", "cifar10", CIFAR),
    _vision("Figure A5", "ImageNet-1K", "imagenet", "90 epochs: 10 warm-up, 70 cosine, 10 cool-down; 8 GPUs."),
    Exhibit(
        name="Table A1",
        title="Logarithm of the zero-shot perplexity on WikiText-103",
        shows="Five checkpoints of the runs of figure 3.",
        claim="LION at its first checkpoint is below SGD at its last.",
        command="python -m tools.paper.rate_constants --evaluate wiki.test.tokens --output runs/rates",
        table=LOG_PERPLEXITY,
    ),
    Exhibit(
        name="Table A2",
        title="Learning rates found",
        shows="The best of 3e-3, 1e-3, 3e-4, ... 1e-6 for each run of figures 1 and A4.",
        claim="none in words; by its table, LION's best rate is at most SGD's in 5 of 6.",
        command="python -m tools.paper.vision_study --dataset cifar100 --data DIR --grid --output runs/vision/cifar100",
        table=RATES_FOUND,
    ),
    Exhibit(
        name="Section 5",
        title="$r$ against $d$ (ours: the paper fits no exponent)",
        shows=r"The text says $r = \Theta(\sqrt{d})$ all through training; an exponent of $1/2$.",
        claim=r"$r$ grows as $\sqrt{d}$.",
        command="python -m tools.paper.scaling_study --output runs/scaling",
    ),
)
