"""Small networks, one for each thing that a file may hold, with example inputs and which of their axes are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F


@dataclass
class Case:
    """`build` makes the network; `inputs(batch)` makes inputs for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    dynamic: tuple[dict[int, Any], ...] | None = None
    network: nn.Module = field(init=False)

    def save(self, path: Path) -> Path:
        """Export with a free batch, the way a user would."""
        torch.manual_seed(0)
        self.network = randomise(self.build()).eval()
        example = self.inputs(3)
        batch = Dim("batch")
        dynamic = self.dynamic or tuple({0: batch} for _ in example)
        torch.export.save(torch.export.export(self.network, example, dynamic_shapes=dynamic), path)
        return path


def randomise(network: nn.Module) -> nn.Module:
    """Statistics and scales of norms that are not the identity."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return network


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = torch.relu_(x + self.body(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"scores": self.a(x), "boxes": [self.b(x).sigmoid(), x.mean(1)]}


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.left(left) * self.right(right)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(tokens))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, 8), kind(8, 6, batch_first=True, **options)
        self.out = nn.Linear(6 * (2 if self.rnn.bidirectional else 1), 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(self.embed(tokens))[0])


class Attention(nn.Module):
    """Heads by `view` with the symbolic batch and length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, time, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(batch, time, 16))


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("scale", torch.rand(5))
        self.register_buffer("hidden", torch.rand(5), persistent=False)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
        self.plain = torch.arange(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * self.scale + self.hidden + self.plain + torch.tensor([1.0, 2, 3, 4, 5])
        return y @ (self.mask.exp() + torch.eye(5))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,ijk->bjk", x, self.weight)


class Strided(nn.Module):
    """Parameters that are views of other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.part = nn.Parameter(torch.randn(10, 6)[2:7, 1:4])
        self.register_buffer("wide", torch.randn(1, 3).expand(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.transposed).sum(1, keepdim=True) + (self.part + self.wide).sum()


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            position = torch.cumsum(x, 1)
            angle = position.sin()
        return self.linear(x) + position * angle


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, _, c, _ = self.linear(x).chunk(4, 1)
        values, indices = torch.topk(a + c, 2, dim=1)
        return values + indices


class Doubled(nn.Module):
    """An output whose first axis is twice the batch, and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return torch.cat([y, y * 2]).view(x.shape[0] * 2, 2, 2)


class Pairs(nn.Module):
    """Both of a pair go through one layer as one batch: torch.export does not believe in the batch by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.a(torch.cat(x.unbind(1))).chunk(2)
        return self.b((first * second).relu()).mean((2, 3))


def floats(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)),)


def tokens(length: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(batch)),)


def _sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


CASES = {
    "mlp": Case(_sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)), floats(6)),
    "log_softmax": Case(_sequential(nn.Linear(6, 4), nn.LogSoftmax(1)), floats(6)),
    "residual_cnn": Case(Residual, floats(3, 8, 8)),
    "depthwise": Case(
        _sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 6, 1), nn.MaxPool2d(2)),
        floats(4, 8, 8),
    ),
    "free_image_size": Case(
        _sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
        floats(3, 9, 11),
        ({0: Dim("batch"), 2: Dim("height", min=4, max=64), 3: Dim("width", min=4)},),
    ),
    "conv1d": Case(_sequential(nn.Conv1d(4, 6, 3, dilation=2), nn.GELU(), nn.GroupNorm(2, 6)), floats(4, 12)),
    "conv_transpose": Case(
        _sequential(nn.ConvTranspose2d(4, 3, 4, stride=2), nn.InstanceNorm2d(3), nn.Upsample(scale_factor=2)),
        floats(4, 5, 5),
    ),
    "several_outputs": Case(Outputs, floats(6)),
    "several_inputs": Case(Inputs, lambda batch: (*floats(6)(batch), *floats(3)(batch))),
    "tied_weights": Case(Tied, tokens(7)),
    "lstm": Case(lambda: Recurrent(nn.LSTM), tokens(7)),
    "lstm_both_ways": Case(lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2), tokens(7)),
    "gru": Case(lambda: Recurrent(nn.GRU), tokens(7)),
    "rnn_both_ways": Case(lambda: Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True, num_layers=2), tokens(7)),
    "attention": Case(Attention, floats(5, 16), ({0: Dim("batch"), 1: Dim("time", min=2, max=100)},)),
    "transformer_layer": Case(lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), floats(5, 16)),
    "constants": Case(Constants, floats(5)),
    "einsum": Case(Einsum, floats(4)),
    "strided_weights": Case(Strided, floats(6)),
    "no_grad": Case(NoGrad, floats(4)),
    "chunk_and_topk": Case(Chunked, floats(6)),
    "pairs": Case(Pairs, floats(2, 3, 5, 5), ({0: Dim.AUTO},)),
    "doubled_batch": Case(Doubled, floats(6)),
    "half_precision": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double(), lambda b: (floats(6)(b)[0].double(),)
    ),
}
