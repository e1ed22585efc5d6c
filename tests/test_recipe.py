import json
import re
from pathlib import Path

import pytest

from llmopt.errors import ExitCode, RecipeError, UsageError
from llmopt.quantize.registry import check_method, check_minutes
from llmopt.recipe import Vocabulary, json_schema, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"

MINIMAL = """\
schema: llmopt.recipe/1
model: demo
output: out
steps:
  - quantize: {name: int8, scheme: w8a16}
"""

FULL = """\
schema: llmopt.recipe/1
model: demo
output: out
seed: 3
threads: 2
steps:
  - quantize: {name: int8, scheme: w8a16, method: rtn, ignore: [lm_head], overrides: {lm_head: w8a8}, format: onnx}
  - quantize:
      name: int4
      scheme: w4a16-g32-asym
bench:
  text: null
  tokens: 100
  window: 50
  prompt: 10
  output: 5
  rounds: 2
gates:
  - perplexity <= +1%
  - {candidate: int4, assert: "perplexity <= +20%"}
"""


def parse_gate(text):
    if not re.search("[<>]=", text):
        raise UsageError(f"{text!r} is not a gate", hint="METRIC <= BOUND")


def parse_budget(text):
    if not text.endswith("MB"):
        raise UsageError(f"{text!r} is not a budget", hint="write 92MB")


VOCABULARY = Vocabulary(
    check_method=check_method, check_minutes=check_minutes, parse_gate=parse_gate, parse_budget=parse_budget
)


@pytest.fixture
def load(tmp_path):
    def load(text, *assignments):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, vocabulary=VOCABULARY, assignments=assignments)

    return load


@pytest.fixture
def refusal(load):
    def refusal(text, *assignments):
        with pytest.raises(RecipeError) as caught:
            load(text, *assignments)
        assert caught.value.exit_code is ExitCode.USAGE
        return caught.value

    return refusal


def place(error):
    """The line and column that an error names."""
    line, column = re.search(r"r\.yaml:(\d+):(\d+)$", error.where).groups()
    return int(line), int(column)


def marked(text):
    """The line and column of the mark in a text."""
    lines = text.partition("▸")[0].split("\n")
    return len(lines), len(lines[-1]) + 1


# What a recipe says.


def test_a_recipe_gives_typed_values(load):
    recipe = load(FULL)
    int8, int4 = (step.quantize for step in recipe.steps)
    assert (recipe.model, recipe.output, recipe.seed, recipe.threads) == ("demo", "out", 3, 2)
    assert (int8.name, int8.scheme, int8.method, int8.format) == ("int8", "w8a16", "rtn", "onnx")
    assert (int8.ignore, int8.overrides) == (("lm_head",), {"lm_head": "w8a8"})
    assert int4.scheme == "w4a16-g32-asym"
    assert (recipe.bench.tokens, recipe.bench.window, recipe.bench.rounds) == (100, 50, 2)
    assert [(gate.candidate, gate.expression) for gate in recipe.gates] == [
        (None, "perplexity <= +1%"),
        ("int4", "perplexity <= +20%"),
    ]


def test_what_is_not_said_has_a_default(load):
    recipe = load(MINIMAL)
    assert (recipe.seed, recipe.threads, recipe.bench, recipe.gates) == (0, None, None, ())
    assert recipe.steps[0].quantize.method == "rtn"
    assert load(MINIMAL + "bench: {}\n").bench.rounds == 5


def test_minutes_are_for_auto_and_need_not_be_whole(load):
    assert load(FULL.replace("method: rtn", "method: awq+auto, minutes: 2.5")).steps[0].quantize.minutes == 2.5
    assert load(FULL.replace("method: rtn", "method: auto, minutes: 3")).steps[0].quantize.minutes == 3


def test_a_recipe_cannot_be_changed_after_it_was_checked(load):
    with pytest.raises(ValueError, match="frozen"):
        load(MINIMAL).seed = 1


def test_scalars_are_those_of_yaml_1_2(load):
    recipe = load(MINIMAL.replace("demo", "no") + "seed: 010\n")
    assert (recipe.model, recipe.seed) == ("no", 10)


def test_a_byte_order_mark_is_no_part_of_the_first_key(load):
    assert load(b"\xef\xbb\xbf" + MINIMAL.encode()).model == "demo"


def test_anchors_and_merge_keys_save_writing(load):
    recipe = load(
        MINIMAL.replace("{name", "&int8 {name")
        + "  - quantize: {<<: *int8, name: second}\n"
        + "  - quantize: {<<: [*int8, {scheme: w8a8, format: onnx}], name: third}\n"
    )
    assert [(step.quantize.name, step.quantize.scheme) for step in recipe.steps] == [
        ("int8", "w8a16"),
        ("second", "w8a16"),
        ("third", "w8a16"),
    ]


# Where a text file is looked for.


def test_the_text_is_found_beside_the_recipe(load, tmp_path):
    (tmp_path / "held_out.txt").write_text("x")
    assert load(MINIMAL + "bench: {text: held_out.txt}\n").bench.text == str(tmp_path / "held_out.txt")


def test_a_text_from_the_command_line_is_found_from_the_working_folder(load, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "work")
    assert load(MINIMAL, "bench.text=mine.txt").bench.text == "mine.txt"


def test_a_text_may_be_a_dataset_of_the_hub_or_in_a_folder_beside_the_recipe(load, tmp_path):
    assert load(MINIMAL + "bench: {text: owner/name@v1:config:test}\n").bench.text == "owner/name@v1:config:test"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert load(MINIMAL + "bench: {text: owner/name::test}\n").bench.text == f"{tmp_path}/owner/name::test"


# What is refused, where, and what was meant.


def replaced(old, new):
    assert old in FULL
    return FULL.replace(old, new)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        (replaced("seed:", "▸sead:"), "unknown key 'sead'", "did you mean 'seed'?"),
        (replaced("scheme: w4", "▸sheme: w4"), "unknown key 'sheme'", "did you mean 'scheme'?"),
        (replaced("name: int4", "▸nme: x"), "unknown key 'nme'", "did you mean 'name'?"),
        (replaced("assert:", "▸asert:"), "unknown key 'asert'", "did you mean 'assert'?"),
        (replaced("quantize:\n", "▸qantize:\n"), "unknown key 'qantize'", "did you mean 'quantize'?"),
        (replaced("rounds:", "▸zzz:"), "unknown key 'zzz'", "known here: text, tokens, window"),
        (replaced("name: int4\n      ", "▸"), "missing key 'name' in 'steps.1.quantize'", None),
        (replaced("model: demo\n", "").replace("schema", "▸schema"), "missing key 'model'", None),
        (replaced("schema: llmopt.recipe/1\n", "▸"), "missing key 'schema'", None),
        (replaced("seed: 3", "seed: ▸three"), "'seed' should be a whole number, not 'three'", None),
        (replaced("seed: 3", "seed: ▸true"), "'seed' should be a whole number, not True", None),
        (replaced("seed: 3", "seed: ▸3.0"), "'seed' should be a whole number, not 3.0", None),
        (replaced("seed: 3", "seed: ▸-3"), "'seed' should be greater than or equal to 0, not -3", None),
        (replaced("tokens: 100", "tokens: ▸0"), "'bench.tokens' should be greater than", None),
        (replaced("model: demo", "model: ▸4"), "'model' should be text, not 4", None),
        (replaced("[lm_head]", "▸lm_head"), "'steps.0.quantize.ignore' should be a list", None),
        (replaced("[lm_head]", "[▸4]"), "'steps.0.quantize.ignore.0' should be text, not 4", None),
        (replaced("{lm_head: w8a8}", "▸[]"), "'steps.0.quantize.overrides' should be a mapping", None),
        (replaced("text: null", "text: ▸4"), "'bench.text' should be text, not 4", None),
        (replaced("format: onnx", "format: ▸pt"), "'steps.0.quantize.format' should be 'onnx'", None),
        (replaced("name: int4", "name: ▸../x"), "'steps.1.quantize.name' should match pattern", None),
        (replaced("name: int4", "name: ▸INT8"), "two steps are named 'INT8'", None),
        (replaced("w4a16-g32-asym", "▸w4a16-g31"), "'w4a16-g31': groups have", "w8a16, w4a16, w2a16 or w8a8"),
        (replaced("method: rtn", "budget: ▸92kg"), "'92kg' is not a budget", "write 92MB"),
        (replaced("{lm_head: w8a8}", "{lm_head: ▸w8}"), "'w8' is not a scheme", "w8a16, w4a16, w2a16 or w8a8"),
        (
            replaced("method: rtn", "method: rtn, minutes: ▸5"),
            "only auto and qat make do",
            "method auto, or",
        ),
        (replaced("method: rtn", "method: auto, minutes: ▸0"), "0 minutes are no time", "give more than 0"),
        (replaced("method: rtn", "method: ▸gtpq"), "there is no method 'gtpq'", "did you mean 'gptq'?"),
        (replaced("- perplexity <= +1%", "- ▸perplexity"), "'perplexity' is not a gate", "METRIC <= BOUND"),
        (replaced('"perplexity <= +20%"', "▸fast"), "'fast' is not a gate", "METRIC <= BOUND"),
        (replaced("- perplexity <= +1%", "- ▸4"), "'gates.0' should be a mapping, not 4", None),
        (replaced("candidate: int4", "candidate: ▸itn4"), "no step is named 'itn4'", "did you mean 'int4'?"),
        (replaced("seed: 3", "▸model: x"), "the key 'model' is here twice", None),
        (replaced("seed: 3", "▸4: x"), "a key must be text", "put it in quotes"),
        (replaced("seed: 3", "▸[a]: x"), "a key must be text", "put it in quotes"),
        (replaced("seed: 3\nthreads", "seed: [3\nthreads▸"), "this is not YAML", None),
        (replaced("      scheme", "▸\tscheme"), "this is not YAML", "indent with spaces"),
        (replaced("seed: 3", "seed: ▸!!python/name:os.system x"), "has no place in a recipe", None),
        (replaced("seed: 3", "seed: ▸!!int x"), "'x' is not what its tag says", None),
        (replaced("seed: 3", "<<: ▸4"), "<< merges mappings only", None),
        (replaced("llmopt.recipe/1", "▸llmopt.recipe/2"), "has schema llmopt.recipe/2", "upgrade llmopt"),
        (replaced("llmopt.recipe/1", "▸1"), "'schema' should be 'llmopt.recipe/1', not 1", None),
        (MINIMAL + "▸steps: []\n", "the key 'steps' is here twice", None),
        (MINIMAL.partition("steps:")[0] + "steps: ▸[]\n", "'steps' should have at least 1 item, not []", None),
        (MINIMAL + "gates: ▸[perplexity <= 1]\n", "nothing is", "add `bench: {}`"),
        (MINIMAL + "▸---\na: b\n", "this is not YAML: but found another document", None),
        (MINIMAL + "bench: {text: ▸gone.txt}\n", "there is no file", "give a .txt or .jsonl file, or OWNER/NAME"),
        (MINIMAL + "bench: {text: ▸gone}\n", "there is no file", "give a .txt or .jsonl file, or OWNER/NAME"),
    ],
)
def test_an_error_names_its_line_and_column_and_what_was_meant(refusal, text, what, hint):
    error = refusal(text.replace("▸", ""))
    assert what in error.what
    assert place(error) == marked(text)
    if hint is None:
        assert error.hint is None
    else:
        assert error.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("- a\n", "a recipe is a mapping"),
        (b"schema: \xff\n", "a recipe is UTF-8 text, and this is not"),
        ("schema: \0\n", "this is not YAML"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: &a {<<: *a}\n", "nested too deeply"),
        ("[" * 600, "nested too deeply"),
        ("#" * 1_000_001, "too large to be a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(refusal, text, what):
    error = refusal(text)
    assert what in error.what
    assert error.where.endswith("r.yaml")


def test_aliases_of_aliases_do_not_fill_the_memory(refusal):
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert "10,000 values" in refusal("\n".join(lines)).what


def test_the_first_of_several_errors_is_the_one_that_stands_first(refusal):
    error = refusal(replaced("seed: 3", "seed: x").replace("rounds: 2", "rounds: x"))
    assert place(error) == (4, 7)


def test_a_missing_file_and_a_folder_are_recipe_errors(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "gone.yaml", vocabulary=VOCABULARY)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path, vocabulary=VOCABULARY)


# --set


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("model=org/name", lambda recipe: recipe.model == "org/name"),
        ("seed=7", lambda recipe: recipe.seed == 7),
        ("steps.0.quantize.scheme=w8a8", lambda recipe: recipe.steps[0].quantize.scheme == "w8a8"),
        ("steps.1.quantize.ignore=[a, b]", lambda recipe: recipe.steps[1].quantize.ignore == ("a", "b")),
        ("steps.1.quantize.overrides.lm_head=w8a8", lambda recipe: recipe.steps[1].quantize.overrides["lm_head"]),
        ("gates.1.assert=kl_divergence <= 1", lambda recipe: recipe.gates[1].expression == "kl_divergence <= 1"),
        ("gates=[]", lambda recipe: recipe.gates == ()),
        ("threads=", lambda recipe: recipe.threads is None),
    ],
)
def test_a_setting_replaces_or_adds_a_value(load, assignment, value):
    assert value(load(FULL, assignment))


def test_a_setting_makes_the_section_that_it_needs(load):
    assert load(MINIMAL, "bench.rounds=9").bench.rounds == 9
    assert load(MINIMAL + "bench:\n", "bench.rounds=9").bench.rounds == 9


def test_later_settings_win(load):
    assert load(FULL, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("assignment", "what", "hint"),
    [
        ("sead=1", "unknown key 'sead'", "did you mean 'seed'?"),
        ("bnech.rounds=1", "unknown key 'bnech'", "did you mean 'bench'?"),
        ("steps.0.quantize.schme=w8a8", "unknown key 'schme'", "did you mean 'scheme'?"),
        ("steps.0.quantize.scheme=w9", "'w9' is not a scheme", "w8a16, w4a16, w2a16 or w8a8"),
        ("seed=x", "'seed' should be a whole number, not 'x'", None),
        ("steps.2.quantize.scheme=w8a8", "'steps' has 2 entries, counted from 0, and none is '2'", None),
        ("steps.-1.quantize.scheme=w8a8", "and none is '-1'", None),
        ("seed.x=1", "'seed' is 3, which has no entry 'x'", None),
        ("seed", "a setting is KEY=VALUE", "--set steps"),
        ("=1", "a setting is KEY=VALUE", "--set steps"),
        ("gates=[{assert: fast}]", "'fast' is not a gate", "METRIC <= BOUND"),
        ("bench={text: gone.txt}", "there is no file 'gone.txt'", "give a .txt or .jsonl file, or OWNER/NAME"),
        ("schema=llmopt.recipe/9", "has schema llmopt.recipe/9", "upgrade llmopt"),
    ],
)
def test_an_error_in_a_setting_names_the_setting(refusal, assignment, what, hint):
    error = refusal(FULL, assignment)
    assert what in error.what
    assert error.where == f"--set {assignment}"
    assert (error.hint or "").startswith(hint or "")


def test_a_setting_that_is_not_yaml_says_so(refusal):
    error = refusal(FULL, "gates=[")
    assert "this is not YAML" in error.what
    assert error.where.startswith("--set gates=[")


# The JSON Schema and the recipes that come with the project.


def test_the_json_schema_describes_every_key_and_knows_both_forms_of_a_gate():
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    undescribed = [
        name
        for section in sections
        for name, key in section["properties"].items()
        if "description" not in key and "$ref" not in key
    ]
    assert undescribed == []
    assert {"type": "string"} in schema["properties"]["gates"]["items"]["anyOf"]
    assert schema["properties"]["schema"]["const"] == "llmopt.recipe/1"


def test_the_json_schema_beside_the_recipes_is_this_one():
    assert json.loads((RECIPES / "recipe.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_project_can_be_read_and_run_on_the_embedded_model(path):
    assert load_recipe(path, vocabulary=VOCABULARY).model == "demo"
