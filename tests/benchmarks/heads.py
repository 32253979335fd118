"""How often find_head finds the head of models of timm, torchvision and transformers, or correctly refuses a model.

The weights are random and on the meta device. The right answers do not come from find_head. A timm model names its
classifier in `default_cfg`. The models of torchvision and transformers are built with 37 classes, and only the head
has 37 outputs. Models with several heads, and models without a head, must be refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_logme.features.heads import find_head
from tests.benchmarks.common import print_table
from tests.zoo import NUM_LABELS, behead, layers_with_outputs, transformer, without_memory

Cases = Iterator[tuple[str, str, "nn.Module | Exception", "str | None"]]

_CLASSIFIERS = tuple(f"For{kind}Classification" for kind in ("Sequence", "Image", "Audio", "Token"))
# Models whose last layer has another number of outputs, according to their code.
_OTHER_HEADS = {
    "CsmForConditionalGeneration": "lm_head",
    "Gemma4AudioModel": "output_proj",
    "NemotronAsrStreamingForRNNT": "joint.head",
    "ParakeetForRNNT": "joint.head",
    "ParakeetForTDT": "joint.head",
    "SeamlessM4TModel": "lm_head",
    "SeamlessM4Tv2Model": "lm_head",
    "ShieldGemma2ForImageClassification": "model.lm_head",  # the logits of two tokens
    "VibeVoiceForConditionalGeneration": "lm_head",
}


def report(repeats: int, quick: bool) -> None:
    missing = [name for name in ("timm", "torchvision", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Heads: not measured, they need pip install {' '.join(missing)}.\n")
        return
    step = 40 if quick else 1
    tallies: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, float] = defaultdict(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cases in (_timm, _torchvision, _classifiers, _encoders):
            start = time.perf_counter()
            for table, name, model, head in cases(step):
                outcome, note = _outcome(model, head)
                tallies[table][outcome].append(f"{name}: {note}" if note else name)
                tallies[table]["models"].append(name)
                seconds[table] += time.perf_counter() - start
                start = time.perf_counter()
    header = ("models", "head found", "refused as it must", "refused", "wrong", "not built")
    print_table(
        "Heads: find_head on random weights",
        ("package", *header, "seconds"),
        [
            (table, *(str(len(tally[column])) for column in header), f"{seconds[table]:.0f}")
            for table, tally in tallies.items()
        ],
    )
    for outcome in ("refused", "wrong", "not built"):
        for table, tally in tallies.items():
            if tally[outcome]:
                print(f"{table}, {outcome}:", *tally[outcome], sep="\n- ", end="\n\n")


def _outcome(model: nn.Module | Exception, head: str | None) -> tuple[str, str]:
    """Compare the result of find_head with the right name, which is None for a model that must be refused."""
    if isinstance(model, Exception):
        return "not built", f"{type(model).__name__}: {str(model).strip().splitlines()[0]}"
    try:
        found = find_head(model)
    except ValueError as error:
        return ("refused as it must", "") if head is None else ("refused", str(error).partition(";")[0])
    return ("head found", "") if found == head else ("wrong", f"{found} instead of {head}")


def _built(build: Callable[..., Any], *args: Any) -> Any:
    try:
        return build(*args)
    except Exception as error:  # A package is missing, or the configuration has no defaults.
        return error


def _timm(step: int) -> Cases:
    import timm

    for name in timm.list_models()[::step]:
        model = _built(without_memory, lambda name=name: timm.create_model(name))
        config = getattr(model, "default_cfg", None) or {}
        head = config.get("classifier") if getattr(model, "num_classes", 0) else None
        head = head if isinstance(head, str) else None
        yield "timm", name, model, head
        if isinstance(model, Exception):
            continue
        model.default_cfg = None
        yield "timm, without `default_cfg`", name, model, head
        model.default_cfg = config
        if model.num_classes:
            without_memory(lambda model=model: model.reset_classifier(0))
        yield "timm, `num_classes=0`", name, model, None


def _torchvision(step: int) -> Cases:
    from torchvision import models

    for name in models.list_models(module=models)[::step]:
        model = without_memory(lambda name=name: models.get_model(name, num_classes=NUM_LABELS))
        head = next(layer for layer in layers_with_outputs(model) if "aux" not in layer.lower())
        yield "torchvision", name, model, head
        yield "torchvision, head replaced by an identity", name, behead(model, head), None


def _classifiers(step: int) -> Cases:
    transformers = _transformers()
    names = [name for name in sorted(dir(transformers)) if name.endswith(_CLASSIFIERS) and "Auto" not in name]
    for name in [name for name in names if not name.startswith("DataCollator")][::step]:
        model = _built(lambda name=name: transformer(getattr(transformers, name)))
        heads = layers_with_outputs(model) if isinstance(model, nn.Module) else []
        head = heads[0] if len(heads) == 1 else None
        yield "transformers, classifiers", name, model, _OTHER_HEADS.get(name, head)


def _encoders(step: int) -> Cases:
    transformers = _transformers()
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    names = {}
    for value in modeling_auto.MODEL_MAPPING_NAMES.values():
        names.update(dict.fromkeys([value] if isinstance(value, str) else value))
    for name in list(names)[::step]:
        model = _built(lambda name=name: transformer(getattr(transformers, name), labels=False))
        yield "transformers, `AutoModel`", name, model, _OTHER_HEADS.get(name)


def _transformers() -> Any:
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    return transformers
