"""Several processes find what one does, and end together."""

import numpy as np
import pytest
import torch

from llmopt.artifact import Manifest, Source
from llmopt.errors import UsageError
from llmopt.pipeline import calibration as calibration_module
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.moments import Moment
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.quantize import require_same_work
from llmopt.pipeline.ranks import ALONE, Ranks, place, processes_here
from llmopt.quantize.awq import Awq
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.search import Search
from llmopt.quantize.weights import QuantizedWeight
from tests.decoders import assignments
from tests.families import CASES, random_weights, spec_of
from tests.ranks import together

WINDOWS = [np.random.default_rng(seed).integers(0, 97, length) for seed, length in enumerate((40, 40, 33, 40, 21))]


def floats(part):
    return {
        name: weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        for name, weight in part.weights.items()
    }


def parts(case, method, ranks, scheme="w4a16", folds=()):
    spec = spec_of(CASES[case])
    calibration = Calibration(spec, WINDOWS, ranks)
    reader = PartReader(
        spec, random_weights(spec), assignments(spec, lambda name: scheme), method, calibration, folds=folds
    )
    embedding = reader.embedding()
    return [embedding, *reader.blocks(), reader.head(embedding)]


def differing(one, other):
    """The share of weights that are not the same to rounding."""
    pairs = [(one[name], other[name]) for name in one]
    differ = sum(int((~torch.isclose(a, b, rtol=1e-4, atol=1e-6)).sum()) for a, b in pairs)
    return differ / sum(a.numel() for a, _ in pairs)


@pytest.fixture
def every_third(monkeypatch):
    """Of tokens a third is sampled for folds, and of windows for a tied head: which, is the same for all sizes."""
    tokens = sum(map(len, WINDOWS))
    monkeypatch.setattr(calibration_module, "SAMPLED_TOKENS", tokens // 3)
    monkeypatch.setattr(calibration_module, "HEAD_TOKENS", tokens // 3)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", ["llama", "gpt2", "llama, tied, wide heads"])
def test_several_processes_make_the_same_weights_as_one(case, size, every_third):
    alone = parts(case, Search(), ALONE, folds=(Awq(),))
    for found in together(size, lambda ranks: parts(case, Search(), ranks, folds=(Awq(),))):
        for part, expected in zip(found, alone, strict=True):
            for layer, other in zip(part.layers, expected.layers, strict=True):
                assert (layer.name, layer.method) == (other.name, other.method)
                assert layer.relative_error == pytest.approx(other.relative_error, rel=1e-3)
            # A weight halfway between two codes may fall either way in sums of another order.
            assert differing(floats(part), floats(expected)) < 2e-3


def test_all_processes_have_the_very_same_weights():
    first, *others = together(3, lambda ranks: parts("llama", Gptq(), ranks, "w8a8"))
    for found in others:
        for part, expected in zip(found, first, strict=True):
            assert all(map(torch.equal, floats(part).values(), floats(expected).values()))


def test_what_bounds_a_token_is_the_same_on_all():
    """The median is that of the first window that is not all zeros, whoever has it."""
    windows = [torch.zeros((6, 8)), torch.randn((6, 8), generator=torch.Generator().manual_seed(0))]
    windows += [100 * windows[1]]

    def moment(own, ranks):
        found = Moment(8, ranks)
        for window in own:
            found.add(window)
        return found.statistics("o_proj")

    expected = moment(windows, ALONE)
    for found in together(3, lambda ranks: moment([windows[ranks.rank]], ranks)):
        assert found.tokens == expected.tokens
        torch.testing.assert_close(found.second_moment_II, expected.second_moment_II)


def test_a_process_without_any_of_the_windows_that_are_looked_at_takes_part_all_the_same():
    window = torch.randn((6, 8), generator=torch.Generator().manual_seed(0))

    def moment(ranks):
        found = Moment(8, ranks)
        if ranks.rank == 1:
            found.add(window)
        return found.statistics("o_proj")

    expected = Moment(8)
    expected.add(window)
    for found in together(2, moment):
        torch.testing.assert_close(found.second_moment_II, expected.statistics("o_proj").second_moment_II)


def test_the_samples_of_all_are_those_of_one(every_third):
    spec = spec_of(CASES["llama"])
    weights = random_weights(spec)
    block = spec.blocks[0]
    floats = {tensor.name: weights.read(tensor) for tensor in block.tensors()}

    def samples(ranks):
        calibration = Calibration(spec, WINDOWS, ranks)
        calibration.embedding({tensor.name: weights.read(tensor) for tensor in spec.embedding.tensors()})
        return calibration.look(block, floats)

    expected = samples(ALONE)
    for found in together(3, samples):
        for name, sample in found.items():
            torch.testing.assert_close(sample.tokens_NI, expected[name].tokens_NI)
            torch.testing.assert_close(sample.largest_I, expected[name].largest_I)


def test_more_processes_than_windows_are_refused():
    with pytest.raises(UsageError, match=r"5 windows .* and 6 processes"):
        Calibration(spec_of(CASES["llama"]), WINDOWS, Ranks(0, 6))


@pytest.mark.parametrize(("count", "size"), [(7, 3), (2, 2), (1, 1), (2, 3)])
def test_shares_are_all_there_is_once_and_even(count, size):
    shares = [range(count)[share] for share in Ranks(0, size).shares(count)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_items_are_computed_once_and_come_back_in_their_order():
    computed = []

    def work(ranks):
        return ranks.spread(lambda item: computed.append(item) or 10 * item, range(5))

    assert together(2, work) == [[0, 10, 20, 30, 40]] * 2
    assert sorted(computed) == list(range(5))


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # left over from something: it takes an address to be one of several
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert place() == (0, 1)
    assert processes_here() == 1


def test_processes_with_different_work_are_refused():
    def manifest(seed):
        return Manifest(
            source=Source(name="demo", revision=None, fingerprint="0"), format="onnx", seed=seed, versions={}
        )

    assert together(2, lambda ranks: require_same_work(manifest(0), ranks)) == [None, None]
    with pytest.raises(UsageError, match="process 1 has another"):
        together(2, lambda ranks: require_same_work(manifest(ranks.rank), ranks))
