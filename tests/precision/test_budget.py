"""A budget is read as it is meant, or told to be none."""

import pytest

from llmopt.errors import UsageError
from llmopt.precision.budget import BitsBudget, PerplexityBudget, SizeBudget, parse_budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("92MB", SizeBudget(92_000_000)),
        (" 0.5 GB ", SizeBudget(500_000_000)),
        ("64MiB", SizeBudget(64 * 2**20)),
        ("900kB", SizeBudget(900_000)),
        ("4.5bits", BitsBudget(4.5)),
        ("5 bits", BitsBudget(5.0)),
        (".5MB", SizeBudget(500_000)),
        ("+2% perplexity", PerplexityBudget(0.02)),
        ("+0.5%", PerplexityBudget(0.005)),
    ],
)
def test_sizes_bits_and_bounds_of_perplexity_are_read(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["92MB", "4.5bits", "+2% perplexity"])
def test_a_budget_prints_as_it_is_typed(text):
    assert str(parse_budget(text)) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("92", "is not a budget"),
        ("92mb", "is not a budget"),
        ("-2% perplexity", "is not a budget"),
        ("2% perplexity", "is not a budget"),
        ("+2% size", "is not a budget"),
        ("1e400MB", "is not a budget"),
        ("", "is not a budget"),
        ("0MB", "more than nothing"),
        ("+0%", "more than nothing"),
        ("33bits", "32 bits before"),
    ],
)
def test_what_is_none_is_told_with_what_there_is(text, told):
    with pytest.raises(UsageError, match=told) as caught:
        parse_budget(text)
    assert "92MB" in str(caught.value.hint)
