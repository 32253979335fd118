"""The classifier head is found in the module tree: small modules, timm, torchvision, transformers, PEFT."""

import re

import pytest
import torch
from models import CLASSES, Classifier, ConvNet, VisionTransformer, mlp
from torch import nn
from torchmetrics import Metric
from zoo import NUM_LABELS, behead, layers_with_outputs, transformer, without_memory

from lightning_logme import find_head
from lightning_logme.features.heads import get_module


class Parts(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def bert(hidden: int = 8) -> nn.Module:
    return Parts(
        encoder=nn.Sequential(nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)),
        pooler=Parts(dense=nn.Linear(hidden, hidden)),
    )


def encoder(width: int = 8, layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)


FOUND = {
    "mlp": (mlp(), "2"),
    "sequential of the module": (Classifier(), "model.2"),
    "torchvision cnn": (Classifier(ConvNet()), "model.fc"),
    "vit, head registered first": (Classifier(VisionTransformer()), "model.heads.head"),
    "vgg": (
        Parts(features=nn.Conv2d(3, 3, 3), classifier=nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))),
        "classifier.2",
    ),
    "mobilenet": (
        Parts(features=nn.Conv2d(3, 3, 3), classifier=nn.Sequential(nn.Dropout(), nn.Linear(8, 4))),
        "classifier.1",
    ),
    "efficientnet-lite": (Parts(_conv_stem=nn.Conv2d(3, 3, 3), _fc=nn.Linear(8, 4)), "_fc"),
    "bert": (Parts(bert=bert(), dropout=nn.Dropout(), classifier=nn.Linear(8, 4)), "classifier"),
    "distilbert": (Parts(distilbert=bert(), pre_classifier=nn.Linear(8, 8), classifier=nn.Linear(8, 4)), "classifier"),
    "roberta": (
        Parts(roberta=bert(), classifier=Parts(dense=nn.Linear(8, 8), out_proj=nn.Linear(8, 4))),
        "classifier.out_proj",
    ),
    "gpt2": (Parts(transformer=bert(), score=nn.Linear(8, 4)), "score"),
    "convnext of timm": (Parts(stages=bert(), head=Parts(norm=nn.LayerNorm(8), fc=nn.Linear(8, 4))), "head.fc"),
    "numbered layers": (Parts(fc1=nn.Linear(9, 8), fc2=nn.Linear(8, 8), fc3=nn.Linear(8, 4)), "fc3"),
    "lettered layers": (Parts(l1=nn.Linear(9, 8), l2=nn.Linear(8, 4)), "l2"),
    "named layers": (
        Parts(input_layer=nn.Linear(9, 8), hidden=nn.Linear(8, 8), output_layer=nn.Linear(8, 4)),
        "output_layer",
    ),
    "backbone and head": (Parts(head=nn.Linear(8, 4), backbone=bert()), "head"),
    "backbone and a layer of any name": (Parts(final=nn.Linear(8, 4), backbone=bert()), "final"),
    "classifier beside a projector": (
        Parts(encoder=bert(), classifier=nn.Linear(8, 4), projector=mlp(8, 8)),
        "classifier",
    ),
    "fc further down": (
        Parts(bb=nn.Sequential(nn.Linear(6, 12)), net=Parts(aux=nn.Linear(12, 3), fc=nn.Linear(12, 4))),
        "net.fc",
    ),
    "vision transformer named classifier": (Parts(classifier=VisionTransformer()), "classifier.heads.head"),
    "inception": (Parts(aux=Parts(fc=nn.Linear(8, 4)), trunk=bert(), fc=nn.Linear(8, 4)), "fc"),
    "resnet for cifar": (
        Parts(conv1=nn.Conv2d(3, 8, 3), layer1=nn.Sequential(Bottleneck(8), Bottleneck(8)), linear=nn.Linear(8, 4)),
        "linear",
    ),
    "vision transformer with a linear patch embedding": (
        Parts(patch=nn.Linear(48, 8), encoder=encoder(), norm=nn.LayerNorm(8), final=nn.Linear(8, 4)),
        "final",
    ),
    "blocks of an encoder beside the head": (
        Parts(embed=nn.Embedding(9, 8), layers=encoder().layers, norm=nn.LayerNorm(8), linear=nn.Linear(8, 4)),
        "linear",
    ),
    "recurrent": (Parts(embed=nn.Embedding(9, 8), rnn=nn.LSTM(8, 6), linear=nn.Linear(6, 4)), "linear"),
    "hidden layer as wide as a channel": (
        Parts(conv=nn.Conv2d(10, 20, 5), fc1=nn.Linear(320, 50), fc2=nn.Linear(50, 10)),
        "fc2",
    ),
    "as many classes as features": (Parts(net=encoder(), classifier=nn.Sequential(nn.Linear(8, 8))), "classifier.0"),
    "blocks before the head": (nn.Sequential(Block(9, 8), Block(8, 8), nn.Linear(8, 4)), "2"),
    "sequence of sequences": (nn.Sequential(mlp(16, 8), mlp(8, 4)), "1.2"),
    "list of layers": (Parts(layers=nn.ModuleList([nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 4)])), "layers.2"),
    "layer without weights behind the head": (nn.Sequential(nn.Linear(8, 4), nn.LogSoftmax(1)), "0"),
    "attention before the head": (Parts(attention=nn.MultiheadAttention(8, 2), linear=nn.Linear(8, 4)), "linear"),
    "embedding of a backbone without its head": (
        Parts(backbone=Parts(features=nn.Conv2d(3, 8, 3), fc=nn.Identity()), linear=nn.Linear(8, 4)),
        "linear",
    ),
    "1 × 1 convolution named head": (Parts(features=nn.Conv1d(3, 8, 3), head=nn.Conv1d(8, 4, 1)), "head"),
    "squeezenet": (
        Parts(
            features=nn.Conv2d(3, 8, 3),
            classifier=nn.Sequential(nn.Dropout(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        ),
        "classifier.1",
    ),
    "all convolutional": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "2",
    ),
}


@pytest.mark.parametrize(("module", "name"), FOUND.values(), ids=FOUND.keys())
def test_head_is_found(module, name):
    assert find_head(module) == name


def test_number_of_outputs_decides_between_equal_candidates():
    module = Parts(decoder=mlp(8, 8), sorter=mlp(8, 4))
    assert find_head(module, num_outputs=4) == "sorter.2"


def test_trained_layer_is_preferred_to_a_frozen_one():
    module = Parts(student=mlp(), teacher=mlp())
    module.teacher.requires_grad_(False)
    assert find_head(module) == "student.2"


def test_networks_inside_metrics_are_ignored():
    class Judge(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def update(self) -> None: ...

        def compute(self) -> None: ...

    assert find_head(Parts(net=mlp(), head=Judge())) == "net.2"


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ({"a": nn.Linear(32, 2), "b": nn.Linear(2, 2).requires_grad_(False)}, "a"),
        ({"fc1": nn.Linear(32, 2), "fc2": nn.Linear(2, 2).requires_grad_(False)}, "fc1"),
        ({"l1": nn.Linear(16, 8), "l2": nn.Linear(8, 4).requires_grad_(False)}, "l2"),  # a fixed mapping to classes
    ],
    ids=["square", "square and numbered", "of another size"],
)
def test_frozen_layer_after_the_head_is_not_the_head(layers, name):
    assert find_head(Parts(**layers)) == name


def test_head_inside_a_lightning_module_has_its_full_name():
    assert find_head(Classifier(Parts(encoder=encoder(), head=nn.Linear(8, 4)))) == "model.head"


SEVERAL = {
    "student and teacher": (Parts(student=mlp(), teacher=mlp()), ["student.2", "teacher.2"]),
    "two tasks": (
        Parts(trunk=bert(), head_a=nn.Linear(8, 4), head_b=nn.Linear(8, 3)),
        ["head_a", "head_b"],
    ),
    "distilled": (Parts(net=encoder(), head=nn.Linear(8, 4), head_dist=nn.Linear(8, 4)), ["head", "head_dist"]),
    "list of heads": (
        Parts(net=encoder(16), heads=nn.ModuleList([mlp(16, 4), mlp(16, 3)])),
        ["heads.0.2", "heads.1.2"],
    ),
    "square layer of unknown use": (Parts(a=nn.Linear(32, 2), b=nn.Linear(2, 2)), ["a", "b"]),
    "head of a backbone before another network": (
        Parts(backbone=ConvNet(100), net=mlp(100, 4)),
        ["backbone.fc", "net.2"],
    ),
}


@pytest.mark.parametrize(("module", "names"), SEVERAL.values(), ids=SEVERAL.keys())
def test_several_heads_are_listed(module, names):
    with pytest.raises(ValueError, match="head: Parts has several layers that could be its classifier head: ") as info:
        find_head(module)
    message = str(info.value)
    assert re.findall(r"'([\w.]+)' \(\d+ → \d+\)", message) == names
    assert f"; give head={names} to score their inputs together, or one of the names." in message


def test_number_of_outputs_decides_between_several_heads():
    module = Parts(trunk=bert(), head_a=nn.Linear(8, 4), head_b=nn.Linear(8, 3))
    assert find_head(module, num_outputs=3) == "head_b"


class Vocoder(nn.Module):
    """A head that transforms the output of its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.register_buffer("window", torch.ones(6))


HEADLESS = {
    "head with more than layers": Parts(backbone=encoder(), head=Vocoder()),
    "encoder": encoder(),
    "encoder of one block": encoder(layers=1),
    "bert": bert(),
    "bert in a lightning module": Classifier(bert()),
    "projection before an encoder": Parts(proj=nn.Linear(9, 8), encoder=encoder()),
    "layer before a recurrent network": Parts(layer=nn.Linear(9, 8), rnn=nn.LSTM(8, 8)),
    "attention": Parts(attention=nn.MultiheadAttention(8, 2)),
    "blocks": nn.Sequential(Block(9, 8), Block(8, 8), Block(8, 4)),
    "activation behind the last layer": nn.Sequential(nn.Linear(9, 8), nn.ReLU()),
    "norm behind the last layer": nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8)),
    "identity in place of the head": Parts(features=nn.Sequential(nn.Linear(9, 8), nn.ReLU()), fc=nn.Identity()),
    "identity in place of a part of the head": Parts(
        encoder=encoder(), classifier=Parts(dense=nn.Linear(8, 6), out_proj=nn.Identity())
    ),
    "autoencoder": Parts(encoder=mlp(16, 4), decoder=mlp(4, 16)),
    "convolution of unknown use": Parts(first=nn.Conv2d(3, 3, 3), last=nn.Conv2d(3, 4, 1)),
    "grouped convolution": Parts(first=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 4, 1, groups=2)),
    "no weights": nn.ReLU(),
}


def refused(module: nn.Module) -> str:
    """Return the message of the error, which must not name any module."""
    with pytest.raises(ValueError, match="head: .* has no torch.nn.Linear or 1 × 1 convolution") as info:
        find_head(module)
    message = str(info.value)
    assert "; give head=None to score its output, layers=['…'] " in message
    assert set(re.findall(r"'([^']*)'", message)) == {"…"}
    return message


@pytest.mark.parametrize("module", HEADLESS.values(), ids=HEADLESS.keys())
def test_module_without_a_head_is_refused_without_proposing_an_inner_layer(module):
    assert type(module).__name__ in refused(module)


def test_unknown_name_is_an_error_with_similar_names():
    with pytest.raises(
        ValueError, match=r"head: Classifier has no module named 'modle.2'; did you mean one of 'model.2'"
    ):
        get_module(Classifier(), "modle.2", "head")
    with pytest.raises(ValueError, match="layers: .* no module named ''"):
        get_module(Classifier(), "", "layers")


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


class TestTimm:
    @staticmethod
    def build(timm, name, **options):
        return without_memory(lambda: timm.create_model(name, **options))

    @pytest.mark.parametrize(
        "name",
        [
            "resnetv2_50",  # 1 × 1 convolution
            "dla34",
            "dpn48b",
            "caformer_s18",  # network as a head
            "convnext_atto",
            "efficientvit_b0",
            "vit_tiny_patch16_224",
            "swin_tiny_patch4_window7_224",
            "vgg11",
            "inception_v3",
            "hrnet_w18_small",
            "mobilenetv3_small_050",
            "mambaout_femto",
            "regnetx_002",
            "resnet50_clip",  # attention as a head
        ],
    )
    def test_head_is_the_classifier_of_the_configuration(self, timm, name):
        model = self.build(timm, name)
        head = model.default_cfg["classifier"]
        assert find_head(model) == head
        assert find_head(Classifier(Parts(net=model, criterion=nn.CrossEntropyLoss()))) == f"model.net.{head}"
        model.reset_classifier(0)
        refused(model)
        model.default_cfg = None
        refused(model)

    @pytest.mark.parametrize("name", ["resnetv2_50", "dla34", "convnext_atto", "swin_tiny_patch4_window7_224", "vgg11"])
    def test_head_is_found_without_the_configuration(self, timm, name):
        model = self.build(timm, name)
        head, model.default_cfg = model.default_cfg["classifier"], None
        assert find_head(model) == head

    @pytest.mark.parametrize(
        "name", ["crossvit_9_240", "efficientvim_m1", "deit_tiny_distilled_patch16_224", "levit_128s", "volo_d1_224"]
    )
    def test_several_heads_are_listed(self, timm, name):
        model = self.build(timm, name)
        heads = list(model.default_cfg["classifier"])
        with pytest.raises(ValueError, match=re.escape(f"; give head={heads} to score")):
            find_head(model)

    def test_head_of_the_module_around_a_headless_backbone_is_found(self, timm):
        backbone = self.build(timm, "convnext_atto", num_classes=0)
        assert find_head(Parts(backbone=backbone, anything=nn.Linear(320, 4))) == "anything"
        refused(Classifier(backbone))

    def test_replaced_head_is_found(self, timm):
        model = self.build(timm, "convnext_atto")
        model.head = nn.Sequential(nn.Dropout(), nn.Linear(320, 4))
        assert find_head(model) == "head.1"


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        "googlenet",
        "vgg11",
        "vit_b_32",
        "maxvit_t",
        "mobilenet_v3_small",
        "convnext_tiny",
        "regnet_y_400mf",
    ],
)
def test_head_of_torchvision_model_is_found_and_refused_when_removed(name):
    models = pytest.importorskip("torchvision.models")
    model = without_memory(lambda: models.get_model(name, num_classes=NUM_LABELS))
    head = next(layer for layer in layers_with_outputs(model) if "aux" not in layer)
    assert find_head(model) == head
    refused(behead(model, head))


class TestTransformers:
    @pytest.mark.parametrize(
        "name",
        [
            "BertForSequenceClassification",
            "DistilBertForSequenceClassification",
            "ElectraForSequenceClassification",
            "BartForSequenceClassification",
            "GPT2ForSequenceClassification",
            "PerceiverForSequenceClassification",
            "LlamaForTokenClassification",
            "ViTForImageClassification",
            "MobileViTForImageClassification",
            "Wav2Vec2ForSequenceClassification",
            "ASTForAudioClassification",
        ],
    )
    def test_head_of_classifier_is_found(self, transformers, name):
        model = transformer(getattr(transformers, name))
        (head,) = layers_with_outputs(model)
        assert find_head(model) == head
        if head.count(".") < 2:
            refused(behead(model, head))

    @pytest.mark.parametrize("name", ["DeiTForImageClassificationWithTeacher", "SwiftFormerForImageClassification"])
    def test_several_heads_are_listed(self, transformers, name):
        model = transformer(getattr(transformers, name))
        with pytest.raises(ValueError, match=re.escape(f"; give head={layers_with_outputs(model)} to score")):
            find_head(model)

    @pytest.mark.parametrize(
        "name",
        [
            "BertModel",
            "ViTModel",
            "CLIPModel",
            "CLIPVisionModel",
            "SiglipVisionModel",
            "Wav2Vec2Model",
            "T5EncoderModel",
            "ElectraModel",
            "MobileViTModel",
            "GPT2Model",
            "RTDetrModel",
            "DeformableDetrModel",
            "BrosModel",
            "EsmModel",
        ],
    )
    def test_encoder_is_refused_without_proposing_an_inner_layer(self, transformers, name):
        model = transformer(getattr(transformers, name), labels=False)
        refused(model)
        refused(Classifier(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
class TestPeft:
    """The head is the copy that PEFT calls, or the adapter around the head."""

    SMALL = {  # noqa: RUF012
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_labels": CLASSES,
    }
    INPUTS = {  # noqa: RUF012
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "pixel_values": torch.zeros(2, 3, 8, 8),
    }

    def model(self, family: str) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        if family == "ViT":
            config = transformers.ViTConfig(image_size=8, patch_size=4, **self.SMALL)
            return transformers.ViTForImageClassification(config)
        config = getattr(transformers, f"{family}Config")(vocab_size=50, pad_token_id=0, **self.SMALL)
        return getattr(transformers, f"{family}ForSequenceClassification")(config)

    @pytest.mark.parametrize(
        ("family", "options", "head"),
        [
            ("Bert", {"task_type": "SEQ_CLS"}, "classifier.modules_to_save.default"),
            ("Roberta", {"task_type": "SEQ_CLS"}, "classifier.modules_to_save.default.out_proj"),
            ("Llama", {"task_type": "SEQ_CLS"}, "score.modules_to_save.default"),
            ("ViT", {"modules_to_save": ["classifier"]}, "classifier.modules_to_save.default"),
            ("Bert", {}, "classifier"),
            ("Bert", {"target_modules": "all-linear"}, "classifier"),
            ("Roberta", {"target_modules": ["query", "dense", "out_proj"]}, "classifier.out_proj"),
            ("Llama", {"target_modules": ["q_proj", "score"]}, "score"),
        ],
    )
    @pytest.mark.parametrize("state", ["train", "eval", "frozen"])
    def test_head_receives_the_feature(self, family, options, head, state):
        peft = pytest.importorskip("peft")
        options = {"target_modules": ["q_proj" if family in ("Llama", "ViT") else "query"], **options}
        module = peft.get_peft_model(self.model(family), peft.LoraConfig(**options))
        module.train(state == "train")
        if state == "frozen":
            module.requires_grad_(False)
        assert find_head(module) == f"base_model.model.{head}"
        shapes = []
        layer = module.get_submodule(find_head(module))
        layer.register_forward_hook(lambda _, args, output: shapes.append((args[0].shape[-1], output.shape[-1])))
        argument = "pixel_values" if family == "ViT" else "input_ids"
        module(**{argument: self.INPUTS[argument]})
        assert shapes == [(16, CLASSES)] == [(layer.in_features, layer.out_features)]

    def test_copy_of_the_active_adapter_is_the_head(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
        module = peft.get_peft_model(self.model("Bert"), config)
        module.add_adapter("other", config)
        assert find_head(module) == "base_model.model.classifier.modules_to_save.default"
        module.set_adapter("other")
        assert find_head(module) == "base_model.model.classifier.modules_to_save.other"
        with module.disable_adapter():
            assert find_head(module) == "base_model.model.classifier.original_module"
        assert find_head(module.merge_and_unload()) == "classifier"

    def test_head_of_timm_model_with_adapters_is_found(self):
        peft, timm = pytest.importorskip("peft"), pytest.importorskip("timm")
        names = {"target_modules": ["fc1"], "modules_to_save": ["head"]}
        module = peft.get_peft_model(timm.create_model("convnext_atto"), peft.LoraConfig(**names))
        assert find_head(module) == "base_model.model.head.modules_to_save.default.fc"

    def test_encoder_with_adapters_is_refused(self):
        peft = pytest.importorskip("peft")
        refused(peft.get_peft_model(self.model("Bert").bert, peft.LoraConfig(target_modules="all-linear")))


@pytest.mark.parametrize("name", ["online", "linear", "probe", "readout"])
def test_number_of_outputs_outweighs_a_name(name):
    module = nn.ModuleDict({"backbone": mlp(8, 32), "predictor": nn.Linear(32, 16), name: nn.Linear(32, 4)})
    assert find_head(module, num_outputs=4) == name
    assert find_head(module, num_outputs=16) == "predictor"
