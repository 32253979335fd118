"""Small networks of common shapes, data for them, and a quiet Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from oracles import problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4


class ConvNet(nn.Module):
    """A CNN as in torchvision and timm: features, pooling, `fc`."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


class VisionTransformer(nn.Module):
    """A vision transformer as in torchvision: a CLS token, blocks of linear layers, `heads.head`."""

    def __init__(self, num_classes: int = CLASSES, checkpointing: bool = False) -> None:
        super().__init__()
        self.heads = nn.Sequential()  # registered first, although it runs last
        self.heads.add_module("head", nn.Linear(16, num_classes))
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        if self.checkpointing:
            encoded = torch.utils.checkpoint.checkpoint(self.encoder, tokens, use_reentrant=False)
        else:
            encoded = self.encoder(tokens)
        return self.heads(encoded[:, 0])


def mlp(num_features: int = 16, num_outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_features, 32), nn.ReLU(), nn.Linear(32, num_outputs))


class Classifier(pl.LightningModule):
    """An ordinary LightningModule without any code for LogME."""

    def __init__(
        self, model: nn.Module | None = None, loss: Any = nn.functional.cross_entropy, lr: float = 0.1
    ) -> None:
        super().__init__()
        self.model = mlp() if model is None else model
        self.loss = loss
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def vectors(n: int = 96, seed: int = 0, classes: int = CLASSES) -> TensorDataset:
    features, labels = problem(n, 16, classes, seed, noise=2.0)
    return TensorDataset(torch.as_tensor(features).float(), torch.as_tensor(labels))


def images(n: int = 48) -> TensorDataset:
    labels = torch.arange(n) % CLASSES
    x = torch.randn(n, 3, 12, 12) + torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(1))[labels]
    return TensorDataset(x, labels)


def loader(data: Any = None, batch_size: int = 20, **options: Any) -> DataLoader:
    return DataLoader(vectors() if data is None else data, batch_size=batch_size, **options)


def trainer(tmp_path: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
    }
    return pl.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**defaults, **options})


def hooks(module: nn.Module) -> int:
    """Return the number of forward hooks of a module and of all modules inside it."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@torch.no_grad()
def penultimate(module: nn.Module, head: str, data: Any) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head for a whole data set, and the labels."""
    seen: list[Tensor] = []
    handle = module.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    training = module.training
    module.eval()
    x, y = data.tensors
    module(x.to(next(module.parameters()).dtype))
    module.train(training)
    handle.remove()
    return seen[0], y
