"""The networks that are compared on, their data, and how their dense form is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import fashion_mnist, phones
from demo.network import SmallResNet

VALIDATION = 0.1
"""The share of the training samples on which hyperparameters are searched."""
PICTURES = 20_000
"""Of the 60,000 of Fashion-MNIST, where the network is a convolutional one."""


@dataclass(frozen=True)
class Data:
    """Inputs `[N, …]` float32, labels `[N]`. `held_out` `[N]` marks the training samples that searches leave out."""

    train_x: Tensor
    train_y: Tensor
    held_out: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Setting:
    """A network, and the budget that every row gets on it."""

    name: str
    what: str
    load: Callable[[], Data]
    build: Callable[[], nn.Module]
    dense_epochs: int
    dense_rate: float
    epochs: int
    """After the dense network, in all stages together."""
    batch: int = 256
    search_seeds: int = 1
    """On so many, 0 and up, hyperparameters are searched: more where few samples are held out."""


def load_phones() -> Data:
    """Held out: whole prompts, as in the test part; neighbouring frames look alike."""
    samples = phones.load()
    file = np.load(phones.DATA)
    prompt = file["utterance"][~file["is_test"][file["utterance"]]]
    prompts = np.unique(prompt)
    chosen = np.random.default_rng(0).permutation(prompts)[: round(VALIDATION * len(prompts))]
    return _data(samples.train_x, samples.train_y, np.isin(prompt, chosen), samples.test_x, samples.test_y)


def load_clothes(flat: bool = False, limit: int | None = None) -> Data:
    samples = fashion_mnist.load_flat() if flat else fashion_mnist.load(limit)
    held_out = _one_in(len(samples.train_x))
    return _data(samples.train_x, samples.train_y, held_out, samples.test_x, samples.test_y)


def load_digits() -> Data:
    """As in Scardapane et al. 2016: scaled to 0 … 1, 25 % test."""
    from sklearn.datasets import load_digits as digits

    x, y = digits(return_X_y=True)
    x = ((x - x.min()) / (x.max() - x.min())).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return _data(x[train], y[train].astype(np.int64), _one_in(len(train)), x[test], y[test].astype(np.int64))


def _one_in(count: int) -> np.ndarray:
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(0).permutation(count)[: round(VALIDATION * count)]] = True
    return chosen


def _data(x: np.ndarray, y: np.ndarray, held_out: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> Data:
    return Data(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (x, y, held_out, test_x, test_y)))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def digits_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 10))


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "phones", "DNN 440-512×4-39, frames of speech to phones", load_phones, phones.build, 12, 1e-3, epochs=12
        ),
        Setting(
            "mlp",
            "MLP 784-300-100-10, Fashion-MNIST",
            lambda: load_clothes(flat=True),
            fashion_mnist.mlp,
            12,
            2e-3,
            epochs=12,
        ),
        Setting(
            "digits",
            "MLP 64-40-20-10, digits",
            load_digits,
            digits_mlp,
            60,
            5e-3,
            epochs=60,
            batch=32,
            search_seeds=5,
        ),
        Setting(
            "lenet",
            f"LeNet-5, {PICTURES:,} pictures of Fashion-MNIST",
            lambda: load_clothes(limit=PICTURES),
            lenet,
            12,
            3e-3,
            epochs=12,
        ),
        Setting(
            "resnet",
            f"residual network with batch norm, width 16, {PICTURES:,} pictures of Fashion-MNIST",
            lambda: load_clothes(limit=PICTURES),
            SmallResNet,
            12,
            5e-3,
            epochs=12,
        ),
    )
}
