"""Which scheme each layer gets, and why."""

import pytest

from llmopt.errors import UsageError
from llmopt.model.spec import ModelSpec
from llmopt.quantize.assign import Assignment, assign, matches
from llmopt.quantize.scheme import Scheme, parse_scheme
from tests.families import CASES, spec_of

W4, W8, W8A8 = map(parse_scheme, ("w4a16", "w8a16", "w8a8"))
DOWN = "model.layers.1.mlp.down_proj"
TABLE, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_of(CASES["llama"])


@pytest.fixture(scope="module")
def tied() -> ModelSpec:
    return spec_of(CASES["qwen3"])


def schemes(found: dict[str, Assignment]) -> dict[str, Scheme | None]:
    return {name: assignment.scheme for name, assignment in found.items()}


def unlike(found: dict[str, Assignment], scheme: Scheme) -> set[str]:
    """The layers with another scheme, or none."""
    return {name for name, assignment in found.items() if assignment.scheme != scheme}


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("lm_head", "lm_head", True),
        ("down_proj", DOWN, True),
        ("mlp.down_proj", DOWN, True),
        ("layers.1.*", DOWN, True),
        ("model.layers.*.mlp.*", DOWN, True),
        ("layers.[01].mlp.down_proj", DOWN, True),
        ("*", DOWN, True),
        ("layers.0.*", DOWN, False),
        ("layers.1", DOWN, False),
        ("proj", DOWN, False),
        ("n_proj", DOWN, False),
        ("Down_proj", DOWN, False),
        ("layers.1.*", "model.layers.11.mlp.down_proj", False),
    ],
)
def test_a_pattern_is_a_name_or_the_end_of_one_with_wildcards(pattern: str, name: str, meant: bool) -> None:
    assert matches(pattern, name) == meant


@pytest.mark.parametrize("case", CASES)
def test_every_embedding_and_linear_is_assigned_in_the_order_of_the_model(case: str) -> None:
    spec = spec_of(CASES[case])
    found = assign(spec, W8)
    assert list(found) == [spec.embedding.name, *(linear.name for linear in spec.linears())]
    assert all(assignment.name == name for name, assignment in found.items())
    assert set(schemes(found).values()) == {W8}


def test_what_was_asked_for_needs_no_reason(spec: ModelSpec) -> None:
    assert {assignment.reason for assignment in assign(spec, W8).values()} == {None}


@pytest.mark.parametrize("scheme", [W4, W8A8])
def test_tables_keep_eight_bits_and_float_activations_and_say_why(spec: ModelSpec, scheme: Scheme) -> None:
    found = assign(spec, scheme)
    assert unlike(found, scheme) == {TABLE, HEAD}
    for name in (TABLE, HEAD):
        assert found[name].scheme == W8
        assert "8 bits" in (found[name].reason or "")


@pytest.mark.parametrize("name", ["w8a16-g128", "w8a16-channel-asym"])
def test_tables_take_any_scheme_of_eight_bits_and_float_activations(spec: ModelSpec, name: str) -> None:
    assert unlike(assign(spec, parse_scheme(name)), parse_scheme(name)) == set()


def test_an_override_is_obeyed_also_where_tables_are_meant(spec: ModelSpec) -> None:
    found = assign(spec, W4, [("lm_head", W4), ("down_proj", W8)])
    assert unlike(found, W4) == {TABLE, *(f"model.layers.{index}.mlp.down_proj" for index in range(3))}
    assert found[DOWN].scheme == W8
    assert found[DOWN].reason == "override: matches 'down_proj'"
    assert found[HEAD].reason == "override: matches 'lm_head'"


def test_the_last_override_that_matches_wins(spec: ModelSpec) -> None:
    found = assign(spec, W4, [("mlp.*", W8), (DOWN, W8A8)])
    assert found[DOWN].scheme == W8A8
    assert found["model.layers.1.mlp.up_proj"].scheme == W8
    assert assign(spec, W4, [(DOWN, W8A8), ("mlp.*", W8)])[DOWN].scheme == W8


def test_ignoring_wins_over_every_override(spec: ModelSpec) -> None:
    found = assign(spec, W4, [(DOWN, W8)], ignore=["layers.1.mlp.*"])
    assert (found[DOWN].scheme, found[DOWN].reason) == (None, "ignored: matches 'layers.1.mlp.*'")
    assert {name for name, assignment in found.items() if assignment.scheme is None} == {
        f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("said", [HEAD, TABLE])
def test_what_is_said_of_one_of_a_tied_pair_holds_for_both(tied: ModelSpec, said: str) -> None:
    other = TABLE if said == HEAD else HEAD
    overridden = assign(tied, W4, [(said, W4)])
    assert (overridden[TABLE].scheme, overridden[HEAD].scheme) == (W4, W4)
    assert overridden[said].reason == f"override: matches {said!r}"
    assert overridden[other].reason == f"shares its bytes with {said}"

    ignored = assign(tied, W4, ignore=[said])
    assert (ignored[TABLE].scheme, ignored[HEAD].scheme) == (None, None)
    assert ignored[said].reason == f"ignored: matches {said!r}"


def test_a_tied_pair_of_which_nothing_is_said_is_a_table(tied: ModelSpec) -> None:
    found = assign(tied, W4)
    assert (found[TABLE].scheme, found[HEAD].scheme) == (W8, W8)
    assert found[TABLE].reason == f"shares its bytes with {HEAD}"


def test_a_pattern_that_means_both_of_a_tied_pair_is_fine(tied: ModelSpec) -> None:
    found = assign(tied, W8, [("*", W4)])
    assert unlike(found, W4) == set()


@pytest.mark.parametrize(
    ("overrides", "ignore"), [([(HEAD, W4), (TABLE, W8)], []), ([(HEAD, W4)], [TABLE]), ([(TABLE, W8)], [HEAD])]
)
def test_two_schemes_for_a_tied_pair_contradict_each_other(
    tied: ModelSpec, overrides: list[tuple[str, Scheme]], ignore: list[str]
) -> None:
    with pytest.raises(UsageError, match="are tied") as caught:
        assign(tied, W8, overrides, ignore)
    assert caught.value.hint


def test_an_untied_pair_may_have_two(spec: ModelSpec) -> None:
    found = assign(spec, W8, [(HEAD, W4)], ignore=[TABLE])
    assert (found[TABLE].scheme, found[HEAD].scheme) == (None, W4)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("lm_haed", "did you mean 'lm_head'?"),
        ("mlp.dwn_proj", "did you mean 'mlp.down_proj'?"),
        ("zzzz", "names look like 'model.layers.0.self_attn.q_proj'"),
        ("layers.3.*", None),
    ],
)
def test_a_pattern_that_means_nothing_is_a_mistake(spec: ModelSpec, pattern: str, hint: str | None) -> None:
    for overrides, ignore in (([(pattern, W8)], []), ([], [pattern])):
        with pytest.raises(UsageError, match="matches no linear and no embedding") as caught:
            assign(spec, W4, overrides, ignore)
        assert repr(pattern) in caught.value.what
        assert caught.value.hint
        assert hint is None or caught.value.hint == hint
