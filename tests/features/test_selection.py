"""Patterns select layers by name."""

import re

import pytest
import torch
from layered import Deep
from models import Classifier
from torch import nn

from lightning_logme.features.selection import Selection, attach_by_tree


def layers_of(module: nn.Module, patterns: list[str]) -> list[str]:
    """Return the layers that patterns select in a module."""
    return attach_by_tree(module, Selection(layers=patterns), "multiclass", None, is_scored=True)[0].layers


class TestPatterns:
    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            (["model.blocks.*"], [f"model.blocks.{index}" for index in range(11)]),  # in the order of the network
            (["model.blocks.?"], [f"model.blocks.{index}" for index in range(10)]),
            (["model.blocks.1*"], ["model.blocks.1", "model.blocks.10"]),
            (["model.blocks.[13].1"], ["model.blocks.1.1", "model.blocks.3.1"]),
            (["model.head", "model.*"], ["model.head"]),  # Each once, and no ModuleList, which is never called.
        ],
    )
    def test_wildcard_stands_for_one_component_of_a_name(self, patterns, expected):
        assert layers_of(Classifier(Deep()), patterns) == expected

    def test_wrappers_do_not_appear_in_names(self):
        module = Classifier(Deep(3))
        module.model = torch.compile(module.model, backend="eager")
        layers = layers_of(module, ["model.blocks.*"])
        assert layers == [f"model.blocks.{index}" for index in range(3)]

    def test_pattern_without_a_match_is_an_error(self):
        with pytest.raises(ValueError, match=r"layers: no module of Classifier matches 'encoder.\*'.*'model.blocks.0'"):
            layers_of(Classifier(Deep()), ["encoder.*"])

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("blocks.*", r"write 'model\.blocks\.\*'\.$"),
            ("blocks.*.0", r"write 'model\.blocks\.\*\.0'\.$"),
            ("model.block.*", r"its modules are 'model', 'model.blocks.0', .*, …\.$"),
        ],
    )
    def test_pattern_without_the_prefix_of_the_wrapper_is_completed_in_the_message(self, pattern, expected):
        with pytest.raises(ValueError, match=f"matches {re.escape(repr(pattern))}, .*; {expected}"):
            layers_of(Classifier(Deep()), [pattern])
