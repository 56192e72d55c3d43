"""Every figure and table of Dong, Li, Lin (2025): what it shows, what it claims, and which command makes ours."""

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
TWO_COLUMNS = "Left: mean training loss and {0}, LION against SGD. Right: r = ||g||_1 / ||g||_2 over training. {1}"
RATIO = "LION is the better one throughout, and r stays of the order of sqrt(d)."

LOG_PERPLEXITY: Table = [
    ["model", "optimizer", "10k", "20k", "30k", "40k", "50k"],
    ["GPT-2 Small", "SGD", "8.202", "8.005", "7.922", "7.892", "7.887"],
    ["GPT-2 Small", "LION", "3.659", "3.409", "3.326", "3.293", "3.284"],
    ["GPT-2 Medium", "SGD", "8.029", "7.807", "7.737", "7.715", "7.712"],
    ["GPT-2 Medium", "LION", "3.221", "3.004", "2.918", "2.882", "2.876"],
]
RATES: Table = [
    ["optimizer", "work", "norm", "rate", "bound met in K", "best in d"],
    ["SGD", "Bottou et al.", "l2", "O(K^-1/4)", "yes", "yes"],
    ["AdaGrad", "Wang et al., Liu et al.", "l2", "O(polylog(K) K^-1/4)", "no", "?"],
    ["AdaGrad", "Hong et al.", "l2", "O(sqrt(d) polylog(K) K^-1/4)", "no", "?"],
    ["RMSProp", "Shi et al.", "min{l1, c l2}", "O(polylog(K) K^-1/4)", "no", "?"],
    ["RMSProp", "Zou et al.", "l2", "O(polylog(K) K^-1/4)", "no", "?"],
    ["RMSProp", "Li et al.", "l1", "O(sqrt(d) K^-1/4)", "yes", "yes"],
    ["Adam", "Zhang et al.", "min{l2, c l2^2}", "O(polylog(K) K^-1/4)", "no", "?"],
    ["Adam", "Zou et al., Wang et al.", "l2", "O(polylog(K) K^-1/4)", "no", "?"],
    ["SignSGD", "Bernstein et al.", "l1", "O(K^-1/4)", "yes", "?"],
    ["SignSGD", "Sun et al.", "l1", "O(d K^-1/4)", "yes", "no"],
    ["SignSGD-EF", "Karimireddy et al.", "l2", "O(K^-1/4)", "yes", "?"],
    ["SignSGD-CF", "Safaryan et al.", "l1", "O(K^-1/4)", "yes", "?"],
    ["LION", "this paper", "l1", "O(sqrt(d) K^-1/4)", "yes", "yes"],
]
RATES_FOUND: Table = [
    ["model", "CIFAR-10 (LION / SGD)", "CIFAR-100 (LION / SGD)"],
    ["ResNet18", "3e-6 / 1e-6", "3e-5 / 3e-4"],
    ["ResNet50", "3e-6 / 3e-6", "3e-5 / 1e-4"],
    ["ViT-S", "1e-6 / 1e-6", "1e-6 / 1e-6"],
]


def _vision(name: str, title: str, dataset: str, setting: str) -> Exhibit:
    return Exhibit(
        name=name,
        title=f"ResNet18, ResNet50 and ViT-S on {title}",
        shows=TWO_COLUMNS.format("top-1 accuracy", setting),
        claim=RATIO,
        command=VISION.format(dataset),
    )


CIFAR = "100 epochs, batches of 64, cosine annealing, exact gradient over the whole training set after each epoch."
OPENWEBTEXT = "OpenWebText, 50,000 steps of 640 sequences, rounds of 100 batches, 16 A100."
EXHIBITS = (
    Exhibit(
        name="Table 1",
        title="Convergence rates of stochastic methods",
        shows="Rates by optimizer, the norm that they are in, and whether they are the best known in K and d.",
        claim="LION's l1 norm falls as sqrt(d) K^(-1/4).",
        command="python -m tools.paper.toy_convergence --output runs/toy",
        table=RATES,
    ),
    _vision("Figure 1", "CIFAR-100", "cifar100", CIFAR),
    Exhibit(
        name="Figure 2",
        title="BERT-Small and BERT-Base",
        shows=TWO_COLUMNS.format("test loss", f"Masked words and sentence order. {OPENWEBTEXT}"),
        claim=RATIO,
        command=LANGUAGE.format("bert_small", "bert_base"),
    ),
    Exhibit(
        name="Figure 3",
        title="GPT-2 Small and GPT-2 Medium",
        shows=TWO_COLUMNS.format("test loss", OPENWEBTEXT),
        claim=RATIO,
        command=LANGUAGE.format("gpt2_small", "gpt2_medium"),
    ),
    Exhibit(
        name="Figure A1",
        title="The toy problem's surface and contours",
        shows="f = theta_1^2 + theta_2^2 + 5 cos(theta_1) cos(theta_2) as a surface (a) and as contours (b).",
        claim="L = 7; minima at (0, +-2.125) and (+-2.125, 0) with f* = 1.884.",
        command="python -m tools.paper.toy_convergence --output runs/toy",
    ),
    Exhibit(
        name="Figure A2",
        title="Lion on the toy problem against the bound",
        shows="Left side of (9) and of (13) (solid) against the right side (dashed) over k, in the box (a) and without "
        "it (b); eta = 0.01, K = 2000, 5 starts x 5 repeats.",
        claim="The measured left sides agree with the theory's rate, for other eta and lambda too.",
        command="python -m tools.paper.toy_convergence --output runs/toy",
    ),
    Exhibit(
        name="Figure A3",
        title="The constants of the rates",
        shows="Running mean of the l1 norm with LION (a) and of the l2 norm with SGD (b) against the smallest constant "
        "times the rate. ResNet18 on CIFAR-100, mean of 5 runs: c_LION = 0.701, c_SGD = 1.365.",
        claim="c_LION is below c_SGD.",
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
        claim="LION's best rate is at most about SGD's.",
        command="python -m tools.paper.vision_study --dataset cifar100 --data DIR --grid --output runs/vision/cifar100",
        table=RATES_FOUND,
    ),
    Exhibit(
        name="Section 5",
        title="r against d (ours: the paper fits no exponent)",
        shows="The text says r = Theta(sqrt(d)) all through training; an exponent of 0.5.",
        claim="r grows as sqrt(d).",
        command="python -m tools.paper.scaling_study --output runs/scaling",
    ),
)
