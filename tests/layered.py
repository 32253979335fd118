"""Networks with several layers to score."""

from models import CLASSES
from torch import Tensor, nn


class Deep(nn.Module):
    """Blocks of the same width and a head."""

    def __init__(self, blocks: int = 11, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def outputs(self, x: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outputs(x)[-1])


class Encoder(nn.Module):
    """A linear layer that makes tokens, and an activation that changes them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 256)
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.project(x)).mean(1))
