"""What is recorded of an epoch."""

from typing import TypedDict


class Record(TypedDict):
    """A line of `metrics.jsonl`: one epoch. Statistics are means over its steps."""

    epoch: int  # from 1
    step: int  # steps taken by its end
    train_loss: float  # of the augmented, smoothed training batches
    test_loss: float  # cross-entropy over all test images
    test_accuracy: float  # 0 to 1
    learning_rate: float
    global_std: float  # of the raw gradients, s_t of the paper
    scale_factor: float | None  # a_t; None where the method has none
    exponent: int | None  # p_t at its end, 0 while undecided; None where the method has none
    layer_std: dict[str, float]  # of the raw gradients by parameter path, from input to output
    images_per_second: float  # in training
    seconds: float  # of training and evaluation
