"""Tokens and maps are pooled to vectors: the axis of the channels, the mask, and the description."""

import copy
import pickle

import pytest
import torch
from models import CLASSES, hooks
from torch import nn

from lightning_logme.features.hooks import CallTrace
from lightning_logme.features.pooling import Call, check_poolings, describe_pooling, find_channel_axis, pool

SAMPLES = 40
LABELS = torch.arange(SAMPLES) % CLASSES


class TestPool:
    tokens = torch.randn(3, 7, 4)
    maps = torch.randn(3, 4, 5, 6)

    def test_vectors_are_returned_unchanged(self):
        vectors = torch.randn(5, 16)
        assert pool(vectors) is vectors

    def test_tokens_are_averaged_or_picked(self):
        torch.testing.assert_close(pool(self.tokens), self.tokens.mean(1))
        torch.testing.assert_close(pool(self.tokens, "mean"), self.tokens.mean(1))
        torch.testing.assert_close(pool(self.tokens, "cls"), self.tokens[:, 0])
        torch.testing.assert_close(pool(self.tokens, "last"), self.tokens[:, -1])

    def test_last_token_is_not_padding(self):
        right, left = torch.ones(3, 7), torch.ones(3, 7)
        right[1, 4:], left[1, :4] = 0, 0
        torch.testing.assert_close(pool(self.tokens, "last", mask=right)[1], self.tokens[1, 3])
        torch.testing.assert_close(pool(self.tokens, "last", mask=left)[1], self.tokens[1, 6])
        torch.testing.assert_close(pool(self.tokens, "last", mask=right)[0], self.tokens[0, 6])

    def test_masked_tokens_do_not_count(self):
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[1, 4:] = 0
        tokens = self.tokens.clone()
        tokens[1, 4:] = torch.nan
        pooled = pool(tokens, mask=mask)
        torch.testing.assert_close(pooled[1], self.tokens[1, :4].mean(0))
        torch.testing.assert_close(pooled[0], self.tokens[0].mean(0))
        with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 3\), but there are 7 tokens"):
            pool(self.tokens, mask=mask[:, :3])
        torch.testing.assert_close(pool(self.maps, mask=mask), self.maps.mean((2, 3)))  # Maps have no tokens.

    def test_first_token_is_not_padding(self):
        left = torch.ones(3, 7, dtype=torch.long)
        left[1, :4] = 0
        pooled = pool(self.tokens, "cls", mask=left)
        torch.testing.assert_close(pooled[1], self.tokens[1, 4])
        torch.testing.assert_close(pooled[0], self.tokens[0, 0])

    def test_maps_are_averaged_over_positions(self):
        torch.testing.assert_close(pool(self.maps), self.maps.mean((2, 3)))
        torch.testing.assert_close(pool(self.maps.permute(0, 2, 3, 1), channel_axis=-1), self.maps.mean((2, 3)))
        torch.testing.assert_close(pool(self.maps.to(memory_format=torch.channels_last)), self.maps.mean((2, 3)))
        torch.testing.assert_close(pool(self.maps[:, :, None].repeat(1, 1, 2, 1, 1)), self.maps.mean((2, 3)))

    def test_half_precision_is_averaged_in_float32(self):
        low = self.maps.bfloat16()
        torch.testing.assert_close(pool(low), low.float().mean((2, 3)))
        assert pool(self.maps.double()).dtype == torch.float64

    def test_callable_must_return_vectors(self):
        torch.testing.assert_close(pool(self.maps, lambda x: x.amax((2, 3))), self.maps.amax((2, 3)))
        with pytest.raises(
            ValueError, match=r"pooling must return a tensor of shape \(N, D\), got \(3, 4, 5\) from \(3, 4, 5, 6\)"
        ):
            pool(self.maps, lambda x: x.mean(3))
        with pytest.raises(ValueError, match="got str"):
            pool(self.maps, lambda x: "x")

    def test_unknown_or_unsuitable_pooling_is_an_error(self):
        with pytest.raises(ValueError, match=r"pooling='cls' needs tokens .* got \(3, 4, 5, 6\)"):
            pool(self.maps, "cls")
        with pytest.raises(ValueError, match=r"got \(3,\)"):
            pool(self.maps[:, 0, 0, 0])
        with pytest.raises(ValueError, match="pooling must be 'auto', 'mean', 'cls', .* or a callable.*got 'max'"):
            check_poolings("max")


class TestChannelAxis:
    @pytest.mark.parametrize(
        ("shape", "inside", "before", "axis"),
        [
            ((8, 96, 7, 7), [Call(96, (8, 96, 7, 7))], [], 1),
            ((8, 7, 7, 96), [Call(96, (8, 7, 7, 96))], [], -1),
            ((8, 32, 56), [Call(32, (8, 32, 56))], [], 1),
            ((8, 56, 32), [Call(32, (8, 56, 32))], [], -1),
            # a linear layer between two permutations, as in ConvNeXt
            ((8, 96, 7, 7), [Call(96, (8, 96, 7, 7)), Call(384, (8, 7, 7, 384)), Call(96, (8, 7, 7, 96))], [], 1),
            # a concatenation that is wider than every layer
            ((8, 48, 7, 7), [Call(32, (8, 32, 7, 7)), Call(16, (8, 16, 7, 7))], [], 1),
            # as many channels as positions
            ((8, 16, 16), [Call(64, (8, 16, 64)), Call(16, (8, 16, 16))], [], -1),
            # an activation
            ((8, 7, 7, 96), [], [Call(3, (8, 3, 28, 28)), Call(96, (8, 7, 7, 96))], -1),
            # an activation of a concatenation whose branches are as wide as the map
            ((8, 1008, 42, 42), [], [Call(42, (8, 42, 83, 83)), Call(42, (8, 42, 42, 42))], 1),
            # an identity behind a permutation
            ((8, 96, 7, 7), [], [Call(96, (8, 7, 7, 96))], 1),
            # patches that become tokens
            ((8, 196, 192), [], [Call(192, (8, 192, 14, 14))], -1),
            # convolutions only, of equal sizes
            ((8, 16, 16, 16), [Call(16, (8, 16, 16, 16), True)], [Call(16, (8, 16, 16, 16), True)], 1),
            ((8, 16, 16, 16), [Call(16, (8, 16, 16, 16), True)], [Call(16, (8, 16, 16, 16))], None),
            ((8, 5, 7), [], [], None),
        ],
    )
    def test_layers_that_ran_decide_the_axis(self, shape, inside, before, axis):
        assert find_channel_axis(inside, before, shape) == axis

    def test_trace_records_calls_inside_a_module_and_before_it(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2))
        trace = CallTrace(network)
        trace.open([network[1], network[2]])
        network(torch.randn(3, 5, 4))
        trace.close()
        assert hooks(network) == 0
        first, second, third = Call(8, (3, 5, 8)), Call(6, (3, 5, 6)), Call(2, (3, 5, 2))
        assert trace.around(network[1]) == ([second, third], [first])
        assert trace.around(network[2]) == ([third], [first, second])
        assert trace.calls == [first, second, third]

    def test_trace_is_complete_when_a_module_has_run(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 2))
        trace, seen = CallTrace(network), []
        network[1].register_forward_hook(lambda module, args, output: seen.append(trace.around(module)))
        trace.open([network[1]])
        network(torch.randn(3, 5, 4))
        assert seen == [([Call(6, (3, 5, 6))], [Call(8, (3, 5, 8))])]

    def test_trace_is_cleared_when_it_is_opened_again(self):
        network = nn.Sequential(nn.Linear(4, 8))
        trace = CallTrace(network)
        for number in (3, 5):
            trace.open([])
            network(torch.randn(number, 4))
            assert trace.calls == [Call(8, (number, 8))]
        trace.close()

    def test_compiled_modules_get_no_hooks_and_count_as_registered(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6))
        network[1].compile(backend="eager")
        trace = CallTrace(network)
        trace.open([network[1]])
        assert hooks(network[1]) == 0
        trace.close()
        assert trace.around(network[1]) == ([Call(6, None)], [Call(8, None)])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_of_a_traced_module_record_nothing(self, copied):
        network = nn.Sequential(nn.Linear(4, 8))
        trace = CallTrace(network)
        trace.open([network[0]])
        copied(network)(torch.randn(3, 4))
        assert trace.calls == []
        trace.close()


@pytest.mark.parametrize(
    ("shape", "pooling", "axis", "mask", "text"),
    [
        ((8, 5, 6), "auto", -1, None, "averaged over tokens, 6 channels on the last axis"),
        ((8, 5, 6), "mean", -1, torch.ones(8, 5), "averaged over tokens under attention_mask, 6 channels on the last"),
        ((8, 5, 6), "channels_first", None, None, "averaged over positions, 5 channels on the second axis"),
        ((8, 5, 6, 7), "auto", 1, torch.ones(8, 5), "averaged over positions, 5 channels on the second axis"),
        ((8, 5, 6), "cls", None, torch.ones(8, 5), "its first token under attention_mask"),
        ((8, 5, 6), "last", None, None, "its last token"),
        ((8, 5, 6), torch.sum, None, None, "pooled by the callable"),
    ],
)
def test_description_says_how_features_are_pooled(shape, pooling, axis, mask, text):
    assert text in describe_pooling(shape, pooling, axis, mask)
