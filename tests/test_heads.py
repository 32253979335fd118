"""Which module is the classifier head."""

import pytest
from models import Classifier, ConvNet, VisionTransformer, mlp
from torch import nn
from torchmetrics import Metric

from lightning_logme.heads import find_head, get_module


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
    "inception": (Parts(aux=Parts(fc=nn.Linear(8, 4)), trunk=bert(), fc=nn.Linear(8, 4)), "fc"),
}


@pytest.mark.parametrize(("module", "name"), FOUND.values(), ids=FOUND.keys())
def test_found(module, name):
    assert find_head(module) == name


def test_the_number_of_outputs_decides_between_equals():
    module = Parts(decoder=mlp(8, 8), sorter=mlp(8, 4))
    assert find_head(module, num_outputs=4) == "sorter.2"


def test_what_is_trained_decides_between_equals():
    module = Parts(student=mlp(), teacher=mlp())
    module.teacher.requires_grad_(False)
    assert find_head(module) == "student.2"


def test_networks_of_metrics_are_no_part_of_the_model():
    class Judge(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def update(self) -> None: ...

        def compute(self) -> None: ...

    assert find_head(Parts(net=mlp(), head=Judge())) == "net.2"


def test_ambiguous():
    with pytest.raises(
        ValueError, match=r"several layers .* 'student\.2' \(32 → 4\), 'teacher\.2' \(32 → 4\).*head='teacher\.2'"
    ):
        find_head(Parts(student=mlp(), teacher=mlp()))
    with pytest.raises(ValueError, match=r"'head_a' \(8 → 4\), 'head_b' \(8 → 3\)"):
        find_head(Parts(trunk=bert(), head_a=nn.Linear(8, 4), head_b=nn.Linear(8, 3)))


def test_impossible():
    with pytest.raises(ValueError, match=r"Parts has no torch.nn.Linear .*head='last'.*layers="):
        find_head(Parts(first=nn.Conv2d(3, 3, 3), last=nn.Conv2d(3, 4, 1)))


def test_unknown_name_suggests_close_ones():
    with pytest.raises(
        ValueError, match=r"head: Classifier has no module named 'modle.2'; did you mean one of 'model.2'"
    ):
        get_module(Classifier(), "modle.2", "head")
    with pytest.raises(ValueError, match="layers: .* no module named ''"):
        get_module(Classifier(), "", "layers")
