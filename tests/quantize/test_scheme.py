"""Schemes by their names."""

import pytest

from llmopt.errors import UsageError
from llmopt.quantize.scheme import CHANNEL, GROUP_SIZES, Scheme, parse_scheme

WEIGHT_ONLY = [
    f"w{bits}a16-{group}-{symmetry}"
    for bits in (2, 4, 8)
    for group in (*(f"g{size}" for size in GROUP_SIZES), "channel")
    for symmetry in ("sym", "asym")
]


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, "w8a8-channel-sym"])
def test_a_full_name_is_the_name_of_its_scheme(name: str) -> None:
    assert parse_scheme(name).name == str(parse_scheme(name)) == name


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("w4a16", "w4a16-g32-asym"),
        ("w2a16", "w2a16-g32-sym"),
        ("w8a16", "w8a16-g64-sym"),
        ("w8a8", "w8a8-channel-sym"),
        ("w4a16-sym", "w4a16-g32-sym"),
        ("w4a16-g128", "w4a16-g128-asym"),
        ("w8a16-asym", "w8a16-g64-asym"),
        ("w4a16-channel", "w4a16-channel-asym"),
        (" W4A16-G64-Sym ", "w4a16-g64-sym"),
    ],
)
def test_what_a_short_name_leaves_out_is_the_default(short: str, full: str) -> None:
    assert parse_scheme(short).name == full


def test_a_name_says_bits_groups_and_symmetry() -> None:
    assert parse_scheme("w4a16-g128-sym") == Scheme(bits=4, activation_bits=16, group_size=128, symmetric=True)
    assert parse_scheme("w8a8") == Scheme(bits=8, activation_bits=8, group_size=CHANNEL, symmetric=True)


def test_a_scheme_has_two_to_the_bits_levels() -> None:
    assert [parse_scheme(name).levels for name in ("w2a16", "w4a16", "w8a16")] == [4, 16, 256]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("int4", "is not a scheme"),
        ("", "is not a scheme"),
        ("w4", "is not a scheme"),
        ("w4a16-sym-g32", "is not a scheme"),
        ("w4a16-g32-channel", "is not a scheme"),
        ("w3a16", "no scheme with 3-bit weights and 16-bit activations"),
        ("w4a8", "no scheme with 4-bit weights and 8-bit activations"),
        ("w4a16-g16", "groups have 32, 64, 128 weights"),
        ("w4a16-g0", "groups have 32, 64, 128 weights"),
        ("w8a8-g64", "w8a8 is per channel and symmetric"),
        ("w8a8-asym", "w8a8 is per channel and symmetric"),
    ],
)
def test_a_name_without_a_kernel_is_a_mistake_in_the_command(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_scheme(name)
    assert caught.value.hint
