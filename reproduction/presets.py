"""The studies of the paper's claims, with their plans."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from reproduction.studies import LOSS, Arms, Axes, Family, Kind, Study, grid, versus_plain
from training.options import Experiment, recipe

# The paper's Table 1: top-1 test accuracy on CIFAR-100 in percent, one run each.
PAPER_METHODS = ("none", "gradient_normalization", "gradient_centralization", "zscore", "autoscale")
PAPER_ACCURACY = {
    "resnet20": dict(zip(PAPER_METHODS, (59.32, 59.58, 60.72, 59.53, 61.34), strict=True)),
    "resnet56": dict(zip(PAPER_METHODS, (70.01, 70.50, 69.73, 68.58, 71.29), strict=True)),
    "vgg16_bn": dict(zip(PAPER_METHODS, (74.54, 74.18, 73.82, 73.91, 74.54), strict=True)),
}
PAPER_MODELS = tuple(PAPER_ACCURACY)
BASELINES = PAPER_METHODS[1:-1]

PARTS = (
    *("none", "centering", "scaling", "constant", "autoscale", "autoscale_p1"),
    *("autoscale_direction", "autoscale_norm"),
)
GRAFTED = PARTS[-2:]  # added after the ablation was planned


def compressed(experiment: Experiment, epochs: int) -> Experiment:
    """The recipe in fewer epochs, with the same total decay of the learning rate as in 200."""
    return dataclasses.replace(experiment, epochs=epochs, decay_epochs=30 * epochs / 200)


def measured(experiment: Experiment) -> Experiment:
    """The same, with its effect on the plain optimizer's updates recorded."""
    return dataclasses.replace(experiment, effect=True)


DIGITS, DIGITS_SGD = (
    measured(dataclasses.replace(compressed(recipe("digits", optimizer), 10), train_size=640))
    for optimizer in ("adamw", "sgd")
)
DIGITS_SCALE = (
    "640 of scikit-learn's digits, enlarged to 16x16 pixels, for 10 epochs, in place of CIFAR-100 "
    "for 200"
)

# Each method at its best learning rate, which other images choose.
DIGITS_TUNED = dataclasses.replace(DIGITS, validation_size=360, effect=False)
PLAIN_TUNED = dataclasses.replace(DIGITS_TUNED, epochs=20, decay_epochs=3.0)  # it learns slowly
# By network. A grid whose end is the best for a method is extended there, as the plan says.
RATES = (0.5e-3, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
DIGITS_RATES = {"resnet20": RATES, "vgg7": RATES, "resnet56": RATES}

VIT = compressed(recipe("digits"), 40)
VIT_TUNED = dataclasses.replace(VIT, validation_size=360)
# 0.0005 was the best for all three methods, and so the grid was extended below it.
VIT_RATES = (0.25e-3, *RATES[:-1])

CIFAR100 = measured(compressed(recipe("cifar100"), 20))
# The recipe's total decay in a tenth of its epochs, to first order.
WEIGHT_DECAY = 5e-5 * 200 / 20
CIFAR100_RATES = (2e-3, 4e-3, 8e-3, 16e-3)
# The best of them by the plan's rule; a test recomputes it from the records.
CIFAR100_BEST_RATE = 0.008
# Seeds that no other run has, for the test at that learning rate.
FRESH = dataclasses.replace(CIFAR100, seed=6, tag="fresh")
# The penalty that `autoscale` may amount to: the mean of 1 / a_t in a pilot run of 10 epochs.
STRONGER, STRONGEST = "penalty2.1", "penalty4"


def with_penalty(factor: float) -> Experiment:
    """CIFAR-100 with Adam and an L2 penalty, a multiple of the recipe's."""
    weight_decay = float(f"{WEIGHT_DECAY * factor:.12g}")
    tag = "" if factor == 1 else f"penalty{factor:g}"
    return dataclasses.replace(CIFAR100, optimizer="adam", weight_decay=weight_decay, tag=tag)


DIGITS_RATES_PLAN = """\
Fixed before the first run. Is there a difference once each method has its own learning rate?
ResNet-20 and ResNet-56 for 10 epochs, and VGG-7, which has no normalization and learns more slowly,
for 20, on 640 digits with AdamW, the paper's schedule compressed in proportion: `none`,
`autoscale`, `autoscale_norm` (the plain step, as long as Autoscale's) and `centering`, each with
the learning rates 0.5, 1, 2, 4, 8 and 16 times 0.001 and the seeds 0 to 4. Runs of one seed start
from the same parameters and see the same batches.

- **The learning rate** of a method in a network is the one with the lowest validation loss after
  the last epoch, as a mean over the seeds; of equals, the smallest. 360 other training images
  validate. A learning rate at which a run diverged is chosen only if a run diverged at all of them.
  If the one chosen for any method is an end of the grid, the grid of that network is extended there
  by a factor of 2 for all methods and seeds, up to three times, and the tests wait for these runs.
- **The outcome** is the test loss after the last epoch, in nats, without label smoothing. Test
  results are reported for the chosen learning rates only. Accuracy is described: one image is 0.28
  points.
- **Primary.** `autoscale` against `none` in each network: one family of three paired t-tests,
  two-sided, with Holm's correction at 0.05; and equivalence within 0.03 nats, by two one-sided
  paired t-tests at 0.05 / 3. At 0.001, in the study `digits`, seeds of AdamW differed by a standard
  deviation of 0.032 nats in ResNet-20 and 0.035 in ResNet-56: a smaller difference is one that
  another seed makes as well.
- **Descriptive**, with 95% intervals: `autoscale_norm` and `centering` against `none`, `autoscale`
  against both.

Expected: no difference in any of the three networks. In ResNet-56 the differences of -3.17 points
and +0.060 nats, which the study `digits` found at 0.001, shrink. `autoscale_norm` is
within 0.03 nats of `autoscale` in the ResNets, and not in VGG-7.

A run diverges when its loss or gradients are not finite; the rule for it is in
`reproduction/statistics.py`. One that stays at chance, 2.303 nats, has not diverged, and counts as
it is. Whatever else is looked at later is called exploratory."""

VIT_RATES_PLAN = """\
Fixed before the first run. A Vision Transformer on digits for 40 epochs with AdamW: `none`,
`autoscale` and `autoscale_norm` with the learning rates 0.5, 1, 2, 4 and 8 times 0.001 and the
seeds 0 to 2. 360 of the 1,437 training images validate, and the others are trained on. The choice
of the learning rate, its grid's extension and the outcome are those of the study `digits-rates`.

- **Primary.** `autoscale` against `none`: the paired t-test at 0.05, two-sided, and equivalence
  within 0.03 nats (two one-sided paired t-tests at 0.05).
- **Descriptive**, with 95% intervals: `autoscale_norm` against both.

Expected: no difference. At 0.001, in the study `vit`, the differences of three seeds had a standard
deviation of 0.039 nats. With that, a true difference of 0.13 nats is found with a probability of
80%, and none is small enough for equivalence."""

CIFAR100_PLAN = """\
Fixed before the first run. All runs: ResNet-20 on CIFAR-100 for 20 epochs, the paper's schedule
compressed in proportion, the same seeds for all methods, so that runs of one seed start from
the same parameters and see the same batches. The outcome is the test accuracy after the last
epoch, in points.

- **A, primary.** `autoscale` against `none` before AdamW, 6 seeds each. Two tests, and no
  others before all 12 runs are in: the paired t-test at alpha = 0.05, two-sided, and
  equivalence within 1 point (two one-sided paired t-tests at 0.05). The paper's claim is +2.0
  points, from one run each.
- **C, the mechanism.** With Adam and an L2 penalty in place of AdamW, 4 seeds each: `none`,
  `autoscale`, `none` with the penalty times 2.1 (the mean of 1 / a_t in a pilot run of 10
  epochs: `autoscale` comes before the penalty, and a factor a_t < 1 there multiplies the
  penalty's share by 1 / a_t), and `none` with the penalty times 4. Weight decay 5e-4, ten times
  the recipe's for a tenth of its epochs. Descriptive, with 95% intervals: is `autoscale` nearer
  to the plain or to the stronger penalty, and would a still stronger one do more?
- **B, which half acts.** `scaling` and `centering` before AdamW against `none`, 3 seeds each.
  One family of two tests with Holm's correction.
- **Baselines.** Gradient Normalization, Gradient Centralization and Z-score before AdamW, 2
  seeds each: descriptive.

A run diverges when its loss or gradients are not finite; the rule for it is in
`reproduction/statistics.py`. Secondary, descriptive: the test loss, the mean accuracy of the
last three epochs, the effect on the updates. Whatever else is looked at later is called
exploratory.

**Again on a GPU**, fixed later: all runs again, with the same seeds, on one GPU. When this was
fixed, A was finished on the CPU, with +0.48 points (-0.28 to +1.23), and C had 2 runs. So A is
a repetition there: the paper's claim stays judged by the CPU's, and what the CPU has not
finished is judged by these runs. Beside them, descriptive, the mean over both devices of each
seed's difference. By default a GPU multiplies float32 numbers as TF32, and so it does here."""


CIFAR100_RATES_PLAN = """\
Fixed before the first run. ResNet-20 on CIFAR-100 for 20 epochs, as in the study `cifar100`, whose
runs are in the figures as well. The outcome is the test accuracy after the last epoch, in points.

- **Learning rates.** `none` and `autoscale` before AdamW with the learning rates 0.002, 0.004,
  0.008 and 0.016, seeds 0 and 1. Descriptive.
- **Primary.** The best of these four learning rates is the one with the highest test accuracy, as a
  mean over both methods and seeds; of equals, the smallest; one at which a run diverged is not
  chosen. If it is 0.016, 0.032 is added first, for both methods and seeds. There, four fresh pairs
  with the seeds 6 to 9, which no other run has: the paired t-test at 0.05, two-sided, and
  equivalence within 1 point (two one-sided paired t-tests at 0.05). No others before all 8 runs are
  in.
- **The penalty.** Adam with an L2 penalty, learning rate 0.001: `autoscale` with the penalty times
  2.1 and 4, `none` with the penalty times 8, seeds 0 and 1. Descriptive: if Autoscale acts by a
  penalty that is 2.1 times stronger, the accuracies of both against the penalty are one curve,
  shifted by 2.1.

Expected: no difference at the best learning rate. The differences of the six pairs in `cifar100`
had a standard deviation of 0.72 points. With that, four pairs find a true difference of 1.5 points
with a probability of 80%, and show equivalence if theirs is below 0.15.

A run diverges when its loss or gradients are not finite; the rule for it is in
`reproduction/statistics.py`. Whatever else is looked at later is called exploratory."""

CIFAR100_LENGTH_PLAN = """\
Fixed before the first run. ResNet-20 on CIFAR-100 for the paper's 200 epochs, seed 0: `none` and
`autoscale` before AdamW, as the paper says, then before Adam with an L2 penalty of 5e-5 after 5
epochs of warm-up, as in the code that the author's later repository names. Descriptive: one run
each, as in the paper. The standard deviation between the six seeds of `none` is 0.46 points at 20
epochs, so differences of less than 1 point say nothing.

- Table 1 has 59.32% for `none` and 61.34% for `autoscale`. The recipe whose `none` is nearer to
  59.32% is likelier the paper's.
- Figure 2: does the global standard deviation fall over 200 epochs?"""


def minus(method: str, baseline: str) -> dict[str, float]:
    """The contrast of two arms."""
    return {method: 1.0, baseline: -1.0}


def table1(arms: Arms) -> list[Family]:
    """Every method against the plain optimizer, and `autoscale` against every other method."""
    label = {it.method: name for name, it in arms.items()}
    planned = [label[method] for method in label if method not in GRAFTED]
    plain, ours = label.get("none"), label.get("autoscale")
    to_plain = [minus(arm, plain) for arm in planned if plain and arm != plain]
    to_ours = [minus(ours, arm) for arm in planned if ours and arm not in (plain, ours)]
    later = [minus(label[m], to) for m in GRAFTED if m in label for to in (plain, ours) if to]
    grafting = "Grafting: the norm of one, the direction of another"
    return [
        Family("Every method against the plain optimizer", "family", to_plain, planned),
        Family("Autoscale against every other method", "family", to_ours, planned),
        Family(grafting, "exploratory", later),
    ]


def cifar100(arms: Arms) -> list[Family]:
    """What `CIFAR100_PLAN` says."""
    label = {it.tag or it.method: name for name, it in arms.items()}
    plain, ours = label["none"], label["autoscale"]
    if STRONGER in label:
        stronger, strongest = label[STRONGER], label[STRONGEST]
        contrasts = [
            *(minus(ours, plain), minus(ours, stronger)),
            *(minus(stronger, plain), minus(strongest, stronger)),
            {ours: 1, plain: -0.5, stronger: -0.5},
        ]
        later = [minus(ours, strongest)]
        return [
            Family("C, the mechanism: Adam with an L2 penalty", "descriptive", contrasts),
            Family("C, further: the strongest penalty", "exploratory", later),
        ]
    halves = [label["scaling"], label["centering"]]
    others = [label[method] for method in BASELINES]
    described = [*(minus(arm, plain) for arm in others), *(minus(ours, arm) for arm in others)]
    return [
        Family(
            "A, primary: Autoscale before AdamW", "primary", [minus(ours, plain)], (plain, ours)
        ),
        Family(
            "B: which half acts, before AdamW",
            "family",
            [minus(arm, plain) for arm in halves],
            (plain, ours, *halves),
        ),
        Family("The baselines, before AdamW", "descriptive", described),
    ]


def best_rates(arms: Arms, kind: Kind = "family") -> list[Family]:
    """What `DIGITS_RATES_PLAN` and `VIT_RATES_PLAN` say."""
    label = {it.method: name for name, it in arms.items()}
    plain, ours = label.pop("none"), label.pop("autoscale")
    others = [*(minus(arm, plain) for arm in label.values())]
    others += [minus(ours, arm) for arm in label.values()]
    return [
        Family("Autoscale, tuned", kind, [minus(ours, plain)], (plain, ours)),
        Family("The other methods, tuned", "descriptive", others),
    ]


def cifar100_rates(arms: Arms) -> list[Family]:
    """What `CIFAR100_RATES_PLAN` says."""
    label = {it.method: name for name, it in arms.items()}
    if len(label) == 1:  # a penalty of one method
        return []
    pair = [minus(label["autoscale"], label["none"])]
    if any(it.tag.startswith("fresh") for it in arms.values()):
        return [Family("Primary: fresh seeds at the best learning rate", "primary", pair)]
    return [Family("By learning rate: the seeds that chose the best", "descriptive", pair)]


def described(arms: Arms) -> list[Family]:
    """Every arm against the plain optimizer, without a test."""
    return [family._replace(kind="descriptive") for family in versus_plain(arms)]


def runs(
    experiment: Experiment,
    seeds: int,
    methods: Sequence[str],
    models: Sequence[str] = (),
    rates: Sequence[float] = (),
) -> tuple[Experiment, ...]:
    """Every model with every method and learning rate."""
    return grid(experiment, Axes(tuple(methods), tuple(models), (), tuple(rates), (), seeds))


def preset(
    name: str, title: str, scale: str, *grids: Sequence[Experiment], **more: object
) -> Study:
    """A study of several grids, each of which is finished before the next one begins."""
    experiments = tuple(experiment for each in grids for experiment in each)
    options: dict = {"families": table1, "preset": True} | more
    return Study(name, title, experiments, scale, **options)


PAIR = ("none", "autoscale")
TUNED = (*PAIR, "autoscale_norm", "centering")
ADAM_WITH_WARMUP = dataclasses.replace(recipe("cifar100", "adam"), warmup_epochs=5.0)
PRESETS = {
    study.name: study
    for study in (
        preset(
            "digits",
            "The paper's comparison, in minutes",
            DIGITS_SCALE,
            # Not VGG-16-BN: on 16x16 images its last three convolutions see a single pixel.
            runs(DIGITS, 5, PAPER_METHODS, ("resnet20", "resnet56")),
            fixed_before=False,
        ),
        preset(
            "ablation",
            "Which part of the method does the work?",
            DIGITS_SCALE,
            runs(DIGITS, 5, PARTS),
            runs(DIGITS_SGD, 5, PARTS),
            fixed_before=False,
        ),
        preset(
            "vit",
            "A Vision Transformer",
            "scikit-learn's digits, enlarged to 16x16 pixels, for 40 epochs",
            runs(measured(VIT), 3, PAIR, ["vit"]),
            fixed_before=False,
        ),
        preset(
            "vit-rates",
            "Does it help a Vision Transformer once the learning rate is tuned?",
            "1,077 of scikit-learn's digits, enlarged to 16x16 pixels, for 40 epochs; 360 others "
            "validate",
            runs(VIT_TUNED, 3, TUNED[:-1], ["vit"], VIT_RATES),
            families=partial(best_rates, kind="primary"),
            outcome=LOSS,
            plan=VIT_RATES_PLAN,
        ),
        preset(
            "digits-rates",
            "Does it help once the learning rate is tuned?",
            f"{DIGITS_SCALE} (VGG-7: 20); 360 others validate",
            *(
                runs(PLAIN_TUNED if model == "vgg7" else DIGITS_TUNED, 5, TUNED, [model], rates)
                for model, rates in DIGITS_RATES.items()
            ),
            families=best_rates,
            outcome=LOSS,
            plan=DIGITS_RATES_PLAN,
        ),
        preset(
            "cifar100",
            "Does it help on CIFAR-100, and why?",
            "CIFAR-100, 20 epochs in place of 200",
            runs(CIFAR100, 6, PAIR),
            runs(with_penalty(1), 4, PAIR),
            runs(with_penalty(2.1), 4, ["none"]),
            runs(with_penalty(4), 4, ["none"]),
            runs(CIFAR100, 3, ["scaling", "centering"]),
            runs(CIFAR100, 2, BASELINES),
            arms=("method", "tag"),
            families=cifar100,
            plan=CIFAR100_PLAN,
        ),
        preset(
            "cifar100-rates",
            "CIFAR-100 against the learning rate and the penalty",
            "CIFAR-100, 20 epochs in place of 200",
            runs(CIFAR100, 2, PAIR, rates=CIFAR100_RATES),
            runs(FRESH, 4, PAIR, rates=[CIFAR100_BEST_RATE]),
            runs(with_penalty(2.1), 2, ["autoscale"]),
            runs(with_penalty(4), 2, ["autoscale"]),
            runs(with_penalty(8), 2, ["none"]),
            groups=("dataset", "optimizer", "model", "tag"),
            families=cifar100_rates,
            plan=CIFAR100_RATES_PLAN,
            beside="cifar100",
        ),
        preset(
            "cifar100-length",
            "CIFAR-100 at the paper's length",
            "the paper's own: CIFAR-100, 200 epochs",
            runs(measured(recipe("cifar100")), 1, PAIR),
            runs(measured(ADAM_WITH_WARMUP), 1, PAIR),
            families=described,
            plan=CIFAR100_LENGTH_PLAN,
        ),
        preset(
            "paper",
            "The paper's comparison",
            "the paper's own: CIFAR-100, 200 epochs; its figures: CIFAR-10, 300 epochs",
            runs(measured(recipe("cifar100")), 5, PAPER_METHODS, PAPER_MODELS),
            runs(measured(recipe("cifar10")), 1, ["autoscale"], PAPER_MODELS),
        ),
    )
}
