"""Real architectures of timm, torchvision and transformers with random weights are scored at the right widths.

The oracles are ``feature_info`` and ``forward_head(…, pre_logits=True)`` of timm, the published widths of torchvision,
and the configurations of transformers.
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
import transformers
from models import CLASSES, Classifier, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_logme import LogMECallback, rank_backbones
from lightning_logme.functional import logme

pytestmark = pytest.mark.slow  # a second per model

SAMPLES = 24


def images(size: int = 64) -> TensorDataset:
    labels = torch.arange(SAMPLES) % CLASSES
    shift = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    return TensorDataset(torch.randn(SAMPLES, 3, size, size) + shift[labels], labels)


def scored(tmp_path: Any, module: pl.LightningModule, data: Any, **options: Any) -> LogMECallback:
    callback = LogMECallback(plots=False, **options)
    trainer(tmp_path, callback).validate(module, data, verbose=False)
    return callback


def width(callback: LogMECallback, key: str = "logme") -> int:
    return callback.evidence[key].weight.shape[1]


def ranked(model: Any, data: Any, **options: Any) -> Any:
    options = {"num_classes": CLASSES, "accelerator": "cpu", "progress": False, "race": False, **options}
    (row,) = rank_backbones({"model": model}, data, **options).rows
    assert row.ended == "finished", row.message
    return row


TIMM = [
    "convnext_atto",
    "davit_tiny",
    "densenet121",
    "dla46_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientnet_lite0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "ghostnet_050",
    "hiera_tiny_224",
    "lcnet_035",
    "mambaout_femto",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "nest_tiny",
    "nf_regnet_b0",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "resmlp_12_224",
    "resnet10t",
    "resnetv2_50",
    "shvit_s1",
    "starnet_s1",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
]


# Stages with several output tensors. The first tensor is scored.
SEVERAL = {
    *(f"features.conv{stage}" for stage in ("2_3", "3_4", "4_6")),  # dpn48b
}


def timm_model(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, img_size=64, **options).eval()
    except TypeError:  # The network takes images of any size.
        return timm.create_model(name, **options).eval()


@pytest.mark.parametrize("name", TIMM)
def test_timm_family_is_scored_at_its_own_widths(tmp_path, name):
    model, data = timm_model(name, num_classes=CLASSES), images()
    stages = {stage["module"]: stage["num_chs"] for stage in model.feature_info if stage["module"] not in SEVERAL}
    assert len(stages) > 1
    callback = scored(tmp_path, Classifier(model), loader(data, 8), layers=[f"model.{stage}" for stage in stages])
    widths = {stage: width(callback, f"logme/model.{stage}") for stage in stages}
    assert widths == stages
    with torch.no_grad():
        features = model.forward_head(model.forward_features(data.tensors[0]), pre_logits=True).flatten(1)
    assert width(callback) == features.shape[1]
    assert callback.history[0]["logme"] == pytest.approx(float(logme(features, data.tensors[1])), abs=1e-3)

    row = ranked(model, loader(data, 8))
    assert (row.feature, row.num_features) == (f"input of '{model.default_cfg['classifier']}'", features.shape[1])
    assert row.logme == pytest.approx(callback.history[0]["logme"], abs=1e-3)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet10t", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_timm_model_without_a_classifier_is_ranked_by_its_output(name):
    model = timm_model(name, num_classes=0)
    row = ranked(model, loader(images(), 8))
    assert (row.feature, row.num_features) == ("output", model.num_features)


TORCHVISION = {
    "convnext_tiny": ("classifier.2", 768, {"features.1": 96, "features.3": 192, "features.7": 768}),
    "densenet121": ("classifier", 1024, {"features.denseblock1": 256, "features.norm5": 1024}),
    "efficientnet_b0": ("classifier.1", 1280, {"features.1": 16, "features.4": 80, "features.8": 1280}),
    "mobilenet_v3_small": ("classifier.3", 1024, {"features.4": 40, "features.12": 576}),
    "regnet_y_400mf": ("fc", 440, {"trunk_output.block1": 48, "trunk_output.block4": 440}),
    "resnet18": ("fc", 512, {"layer1": 64, "layer2": 128, "layer4": 512}),
    "shufflenet_v2_x0_5": ("fc", 1024, {"stage2": 48, "stage4": 192, "conv5": 1024}),
    "squeezenet1_1": ("classifier.1", 512, {"features.3": 128, "features.12": 512}),
    "swin_t": ("head", 768, {"features.1": 96, "features.3": 192, "features.7": 768}),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_family_is_scored_at_its_own_widths(tmp_path, name):
    head, num_features, stages = TORCHVISION[name]
    model, data = torchvision.models.get_model(name, num_classes=CLASSES).eval(), images()
    callback = scored(tmp_path, Classifier(model), loader(data, 8), layers=[f"model.{stage}" for stage in stages])
    assert width(callback) == num_features
    assert {stage: width(callback, f"logme/model.{stage}") for stage in stages} == stages
    row = ranked(model, loader(data, 8))
    assert (row.feature, row.num_features) == (f"input of '{head}'", num_features)
    assert row.logme == pytest.approx(callback.history[0]["logme"], abs=1e-3)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SMALL, "vocab_size": 50, "pad_token_id": 0}
_VISION = {**_SMALL, "image_size": 32, "patch_size": 8}
_SPEECH = {
    **_SMALL,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
}
# By class: the configuration, the head, the width of the input of the head, and layers with their widths.
TRANSFORMERS: dict[str, tuple[dict[str, Any], str, int, dict[str, int]]] = {
    "BertForSequenceClassification": (_TEXT, "classifier", 32, {"bert.encoder.layer.1": 32}),
    "RobertaForSequenceClassification": (
        {**_TEXT, "pad_token_id": 1},
        "classifier.out_proj",
        32,
        {"roberta.encoder.layer.0": 32},
    ),
    "DistilBertForSequenceClassification": (
        {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "classifier",
        32,
        {"distilbert.transformer.layer.1": 32},
    ),
    "ElectraForSequenceClassification": (
        {**_TEXT, "embedding_size": 24},
        "classifier.out_proj",
        32,
        {"electra.embeddings": 24, "electra.encoder.layer.1": 32},
    ),
    "GPT2ForSequenceClassification": (
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        "score",
        32,
        {"transformer.h.1": 32},
    ),
    "LlamaForSequenceClassification": (
        {**_TEXT, "num_key_value_heads": 4},
        "score",
        32,
        {"model.layers.1": 32, "model.layers.0.mlp": 32},
    ),
    "ViTForImageClassification": (_VISION, "classifier", 32, {"vit.embeddings": 32}),
    "SwinForImageClassification": (
        {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "classifier",
        32,
        {"swin.encoder.layers.0": 32, "swin.embeddings": 16},
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
        "classifier",
        40,
        {"convnext.encoder.stages.0": 16, "convnext.encoder.stages.3": 40},
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"},
        "classifier.1",
        24,
        {"resnet.encoder.stages.0": 16, "resnet.embedder": 16},
    ),
    "Wav2Vec2ForSequenceClassification": (
        _SPEECH,
        "classifier",
        24,
        {"wav2vec2.feature_extractor.conv_layers.1": 16, "wav2vec2.encoder.layers.1": 32, "projector": 24},
    ),
    "ASTForAudioClassification": (
        {**_SMALL, "num_mel_bins": 32, "max_length": 64},
        "classifier.dense",
        32,
        {"audio_spectrogram_transformer.embeddings": 32},
    ),
}


class Transformer(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(**batch)


def inputs_of(config: Any) -> dict[str, Tensor]:
    """Return inputs of the kind that a model takes. They depend on the labels."""
    labels = torch.arange(SAMPLES) % CLASSES
    if isinstance(config, transformers.ASTConfig):
        return {"input_values": torch.randn(SAMPLES, 64, 32) + labels[:, None, None], "labels": labels}
    if isinstance(config, transformers.Wav2Vec2Config):
        return {"input_values": torch.randn(SAMPLES, 800) * (1 + labels[:, None]), "labels": labels}
    if hasattr(config, "num_channels"):
        size = getattr(config, "image_size", 64)
        pixels = torch.randn(SAMPLES, 3, size, size) + labels[:, None, None, None]
        return {"pixel_values": pixels, "labels": labels}
    tokens = torch.randint(10, 50, (SAMPLES, 9))
    tokens[:, 1] = labels + 2
    mask = (torch.arange(9) < torch.randint(4, 10, (SAMPLES, 1))).long()
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def batches_of(inputs: dict[str, Tensor]) -> DataLoader:
    rows = [{name: values[index] for name, values in inputs.items()} for index in range(SAMPLES)]
    return DataLoader(rows, batch_size=8)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_architecture_is_scored_at_its_own_widths(tmp_path, name):
    options, head, num_features, layers = TRANSFORMERS[name]
    cls = getattr(transformers, name)
    config = cls.config_class(num_labels=CLASSES, **options)
    model = cls(config).eval()
    data = batches_of(inputs_of(config))
    callback = scored(tmp_path, Transformer(model), data, layers=[f"net.{layer}" for layer in layers])
    assert width(callback) == num_features
    assert {layer: width(callback, f"logme/net.{layer}") for layer in layers} == layers

    seen: list[Tensor] = []
    model.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    row = ranked(model, data)
    assert (row.feature, row.num_features) == (f"input of '{head}'", num_features)
    assert row.logme == pytest.approx(callback.history[0]["logme"], abs=1e-3)
    assert {inputs.shape[-1] for inputs in seen} == {num_features}

    encoder = model.base_model
    if encoder is not model and "Wav2Vec2" not in name:
        row = ranked(encoder, data)
        hidden = {"SwinForImageClassification": 32, "ConvNextForImageClassification": 40}
        assert (row.feature, row.num_features) == ("output", hidden.get(name, num_features))
