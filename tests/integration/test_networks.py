"""Networks of all kinds and precisions are scored without changes to the module."""

import lightning.pytorch as pl
import pytest
import torch
from models import CLASSES, Classifier, ConvNet, VisionTransformer, images, loader, mlp, penultimate, trainer, vectors
from torch import nn
from torch.utils.data import DataLoader

from lightning_logme import LogMECallback
from lightning_logme.functional import logme
from lightning_logme.scores.moments import Moments

NETWORKS = {
    "cnn": (ConvNet, "model.fc", images),
    "vit": (VisionTransformer, "model.heads.head", images),
    "mlp": (mlp, "model.2", vectors),
    "vit with gradient checkpointing": (lambda: VisionTransformer(checkpointing=True), "model.heads.head", images),
}


@pytest.mark.parametrize(("build", "head", "data"), NETWORKS.values(), ids=NETWORKS.keys())
def test_network_is_scored_by_the_input_of_its_head(tmp_path, build, head, data):
    data = data()
    module, callback = Classifier(build()), LogMECallback()
    trainer(tmp_path, callback).fit(module, loader(data), loader(data))
    expected = logme(*penultimate(module, head, data))
    assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("32-true", 1e-6),
        ("64-true", 1e-6),
        ("bf16-mixed", 0.02),
        ("bf16-true", 0.02),
        ("16-true", 0.02),
    ],
)
def test_precision_of_the_run_does_not_reach_the_sums(tmp_path, monkeypatch, precision, tolerance):
    data, accumulate, seen = images(), Moments.accumulate, []

    def recorded(moments, rows):
        seen.append(moments.gram.dtype)
        return accumulate(moments, rows)

    monkeypatch.setattr(Moments, "accumulate", recorded)
    module, callback = Classifier(ConvNet(), lr=1e-3), LogMECallback()
    trainer(tmp_path, callback, precision=precision, max_epochs=1).fit(module, loader(data), loader(data))
    assert set(seen) == {torch.float64}
    module = module.float()
    expected = logme(*penultimate(module, "model.fc", data))
    assert callback.history[-1]["logme"] == pytest.approx(float(expected), abs=tolerance)
    assert isinstance(callback.history[-1]["logme"], float)


# torch.compile gives this warning when it traces a hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("part", ["module", "model", "wrapped"])
def test_compiled_module_is_scored(tmp_path, part, precision):
    torch.compiler.reset()
    data = vectors()
    module, callback = Classifier(), LogMECallback(layers=["model.0"] if part != "wrapped" else [])
    if part == "module":
        module.compile(backend="eager", fullgraph=True)
    elif part == "model":
        module.model.compile(backend="eager", fullgraph=True)
    else:
        module.model = torch.compile(module.model, backend="eager", fullgraph=True)
    run = trainer(tmp_path, callback, precision=precision)
    run.validate(module, loader(data), verbose=False)
    run.fit(module, loader(data), loader(data))
    head = "model._orig_mod.2" if part == "wrapped" else "model.2"
    with torch.compiler.set_stance("force_eager"):
        expected = logme(*penultimate(module, head, data))
    assert [row["num_samples"] for row in callback.history if row["key"] == "logme"] == [96] * 3
    tolerance = 1e-5 if precision == "32-true" else 0.02
    assert callback.history[-1 - len(callback.layers)]["logme"] == pytest.approx(float(expected), abs=tolerance)


class TestHuggingFace:
    @staticmethod
    def batches(n=48):
        """Return token ids of different lengths; the second token tells the class."""
        generator = torch.Generator().manual_seed(0)
        items = []
        for index in range(n):
            label, length = index % CLASSES, 4 + index % 7
            ids = torch.randint(10, 50, (length,), generator=generator)
            ids[1] = label + 1
            items.append({"ids": ids, "label": label})
        return items

    @staticmethod
    def collate(items):
        ids = nn.utils.rnn.pad_sequence([item["ids"] for item in items], batch_first=True)
        lengths = torch.tensor([len(item["ids"]) for item in items])
        labels = torch.tensor([item["label"] for item in items])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Module(pl.LightningModule):
        def __init__(self, name):
            super().__init__()
            transformers = pytest.importorskip("transformers")
            shared = {"vocab_size": 50, "num_labels": CLASSES}
            small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
            configs = {
                "Bert": small,
                "Roberta": {**small, "max_position_embeddings": 64},
                "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
            }
            config = getattr(transformers, f"{name}Config")(**shared, **configs[name])
            self.net = getattr(transformers, f"{name}ForSequenceClassification")(config)

        def training_step(self, batch, batch_idx):
            return self.net(**batch).loss

        def validation_step(self, batch, batch_idx):
            output = self.net(**batch)
            self.log("val_loss", output.loss, batch_size=len(batch["labels"]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    @pytest.mark.parametrize(
        ("name", "head", "layer"),
        [
            ("Bert", "net.classifier", "net.bert.encoder"),
            ("Roberta", "net.classifier.out_proj", "net.roberta.encoder"),
            ("DistilBert", "net.classifier", "net.distilbert"),
        ],
    )
    def test_sequence_classifier_is_scored(self, tmp_path, name, head, layer):
        module, callback = self.Module(name), LogMECallback(layers=[layer])
        data = DataLoader(self.batches(), batch_size=10, collate_fn=self.collate)
        run = trainer(tmp_path, callback)
        run.fit(module, data, data)
        module.eval()
        heads, layers, labels = [], [], []
        module.get_submodule(head).register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        module.get_submodule(layer).register_forward_hook(lambda _, args, output: layers.append(output[0]))
        with torch.no_grad():
            for batch in data:
                module.net(**batch)
                mask = batch["attention_mask"][..., None]
                layers[-1] = (layers[-1] * mask).sum(1) / mask.sum(1)
                labels.append(batch["labels"])
        for key, features in (("logme", heads), (f"logme/{layer}", layers)):
            expected = float(logme(torch.cat(features), torch.cat(labels)))
            assert float(run.callback_metrics[key]) == pytest.approx(expected, rel=1e-4)


class TestModulesOfUsers:
    """LightningModules in the various styles of users."""

    def test_module_with_a_shared_step_and_metrics_is_scored(self, tmp_path):
        from torchmetrics.classification import MulticlassAccuracy

        class LitDigits(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.accuracy = MulticlassAccuracy(CLASSES)
                self.layer_1, self.layer_2, self.layer_3 = nn.Linear(16, 24), nn.Linear(24, 12), nn.Linear(12, CLASSES)

            def forward(self, x):
                x = torch.relu(self.layer_1(x))
                x = torch.relu(self.layer_2(x))
                return torch.log_softmax(self.layer_3(x), 1)

            def _shared(self, batch):
                x, y = batch
                logits = self(x.view(x.size(0), -1))
                return nn.functional.nll_loss(logits, y), self.accuracy(logits, y)

            def training_step(self, batch, _):
                return self._shared(batch)[0]

            def validation_step(self, batch, _):
                loss, accuracy = self._shared(batch)
                self.log_dict({"val_loss": loss, "val_acc": accuracy}, prog_bar=True)

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 1e-3)

        module, callback = LitDigits(), LogMECallback()
        run = trainer(tmp_path, callback)
        run.fit(module, loader(), loader())
        assert {"logme", "logme_gain", "val_acc"} <= set(run.callback_metrics)
        expected = logme(*penultimate(module, "layer_3", vectors()))
        assert callback.history[-1]["logme"] == pytest.approx(float(expected), rel=1e-5)

    def test_module_with_late_configuration_and_manual_optimization_is_scored(self, tmp_path):
        class Data(pl.LightningDataModule):
            def train_dataloader(self):
                return loader()

            def val_dataloader(self):
                return [loader(), loader(vectors(40, seed=2))]

        class Late(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.backbone = None

            def configure_model(self):
                if self.backbone is None:
                    self.head = nn.Linear(8, CLASSES)
                    self.backbone = nn.Sequential(nn.Linear(16, 8), nn.Tanh())

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
                self.manual_backward(loss)
                optimizer.step()

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return {"logits": self.head(self.backbone(batch[0]))}

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        callback = LogMECallback()
        run = trainer(tmp_path, callback)
        run.fit(Late(), datamodule=Data())
        assert [row["num_samples"] for row in callback.history] == [96, 40] * 2
        assert callback.history[-1]["key"] == "logme/dataloader_idx_1"

    def test_contrastive_module_with_two_views_needs_a_pooling(self, tmp_path):
        class Views(torch.utils.data.Dataset):
            def __len__(self):
                return 60

            def __getitem__(self, index):
                x, y = vectors(60)[index]
                return {"views": torch.stack([x, x + 0.1]), "meta": {"id": index}, "class_id": y}

        class Student(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.student, self.teacher = mlp(), mlp().requires_grad_(False)

            def step(self, batch):
                views = batch["views"].flatten(0, 1)  # one forward pass for both
                return nn.functional.mse_loss(self.student(views), self.teacher(views))

            def training_step(self, batch, batch_idx):
                return self.step(batch)

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.step(batch))

            def configure_optimizers(self):
                return torch.optim.SGD(self.student.parameters(), 0.1)

        data = DataLoader(Views(), batch_size=20)
        with pytest.raises(ValueError, match="gave 40 features for 20 labels.*pooling=callable"):
            trainer(tmp_path, LogMECallback(target="class_id")).fit(Student(), data, data)
        callback = LogMECallback(target="class_id", layers=["student.0"], pooling=lambda x: x.view(-1, 2, 32)[:, 0])
        trainer(tmp_path, callback).fit(Student(), data, data)
        assert callback.history[-1]["num_samples"] == 60
