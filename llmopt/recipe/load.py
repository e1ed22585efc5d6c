"""From a recipe file to a `Recipe`; every error names the line and column, and what was probably meant."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmopt.calibrate.dataset_name import SYNTAX, could_be_on_the_hub
from llmopt.errors import RecipeError, near_match
from llmopt.recipe.document import Document, Keys, Place, parse
from llmopt.recipe.schema import SCHEMA, PartitionStep, QuantizeStep, Recipe, Vocabulary

_LARGEST_BYTES = 1_000_000
# In people's words, what pydantic says in Python's.
_TYPES = {
    "string_type": "be text",
    "int_type": "be a whole number",
    "tuple_type": "be a list",
    "too_short": "have at least 1 item",
    "dict_type": "be a mapping",
    "model_type": "be a mapping",
    "path_type": "be text",
}
_SUBJECT = re.compile(r"^(Input|String) should ")


def load_recipe(path: Path, *, vocabulary: Vocabulary, assignments: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        vocabulary: the words that other rooms define.
        assignments: `key.path=value`, applied in order before anything is checked.

    Raises:
        RecipeError: it cannot be read, or does not say something possible.
    """
    document = parse(_read(path), label=str(path), folder=path.parent)
    if not isinstance(document.value, dict):
        what = "the recipe is empty" if document.value is None else "a recipe is a mapping"
        raise RecipeError(what, where=str(path), hint=f"begin with `schema: {SCHEMA}`")
    for assignment in assignments:
        document.assign(assignment)
    _check_version(document)
    recipe = _validate(document, vocabulary)
    _check_names(recipe, document)
    return _with_texts_found(recipe, document)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise RecipeError("this is too large to be a recipe", where=str(path))
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError("a recipe is UTF-8 text, and this is not", where=str(path)) from error
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", where=str(path)) from error


def _check_version(document: Document) -> None:
    version = document.value.get("schema")
    if isinstance(version, str) and version.startswith("llmopt.recipe/") and version != SCHEMA:
        raise RecipeError(
            f"this recipe has schema {version}, and this llmopt reads {SCHEMA}",
            where=str(document.place(("schema",))),
            hint="upgrade llmopt, or write the recipe for the older schema",
        )


def _validate(document: Document, vocabulary: Vocabulary) -> Recipe:
    try:
        return Recipe.model_validate(document.value, context=vocabulary)
    except ValidationError as error:
        raise first_mistake(error, document) from error


def first_mistake(error: ValidationError, document: Document) -> RecipeError:
    """The mistake that stands first in a document, as an error that names its place."""
    errors = error.errors(include_url=False)
    # A list whose only item is wrong is told to be too short as well: what is wrong inside says more.
    inner = [one for one in errors if not any(_holds(one["loc"], other["loc"]) for other in errors)]
    return _explained(min(inner, key=lambda one: document.place(one["loc"])), document)


def _holds(outer: Keys, inner: Keys) -> bool:
    return len(outer) < len(inner) and inner[: len(outer)] == outer


def _explained(error: ErrorDetails, document: Document) -> RecipeError:
    keys: Keys = error["loc"]
    context: dict[str, Any] = error.get("ctx", {})
    if error["type"] == "unknown_key":
        where = document.key_place((*keys, context["key"]))
        return RecipeError(error["msg"], where=str(where), hint=context["hint"])
    where = document.place(keys)
    if error["type"] == "missing":
        holder = f" in {_dotted(keys[:-1])}" if keys[:-1] else ""
        return RecipeError(f"missing key {keys[-1]!r}{holder}", where=str(where))
    if error["type"] == "refused":
        return RecipeError(error["msg"], where=str(where), hint=context["hint"])
    wanted = _TYPES.get(error["type"]) or _SUBJECT.sub("", error["msg"])
    return RecipeError(f"{_dotted(keys)} should {wanted}, not {error['input']!r}", where=str(where))


def _dotted(keys: Keys) -> str:
    return repr(".".join(map(str, keys)))


def _check_names(recipe: Recipe, document: Document) -> None:
    names: list[str] = []
    for index, step in enumerate(recipe.steps):
        # Each is a folder's name, and not every disk tells upper case from lower.
        if step.work.name.lower() in (name.lower() for name in names):
            where = document.place(("steps", index, step.kind, "name"))
            raise RecipeError(f"two steps are named {step.work.name!r}", where=str(where))
        names.append(step.work.name)
    for index, gate in enumerate(recipe.gates):
        if gate.candidate is not None and gate.candidate not in names:
            where = document.place(("gates", index, "candidate"))
            raise RecipeError(
                f"no step is named {gate.candidate!r}", where=str(where), hint=near_match(gate.candidate, names)
            )
    plans = [step.partition.name for step in recipe.steps if step.partition is not None]
    if recipe.bench is None and any(gate.candidate not in plans for gate in recipe.gates):
        where = document.place(("gates",))
        raise RecipeError("gates judge what was measured, and nothing is", where=str(where), hint="add `bench: {}`")


def _with_texts_found(recipe: Recipe, document: Document) -> Recipe:
    """The recipe with its paths to text made those of what is there."""
    steps = []
    for index, step in enumerate(recipe.steps):
        keys: Keys = ("steps", index, step.kind)
        if isinstance(step.work, PartitionStep):
            cluster = _beside(step.work.cluster, document.place((*keys, "cluster")))
            planned = step.work.model_copy(update={"cluster": cluster})
            steps.append(step.model_copy(update={step.kind: planned}))
            continue
        found: dict[str, object] = {"calib": _found(step.work.calib, document.place((*keys, "calib")))}
        if isinstance(step.work, QuantizeStep) and (training := step.work.training) is not None:
            data = _found(training.data, document.place((*keys, "training", "data")))
            found["training"] = training.model_copy(update={"data": data})
        steps.append(step.model_copy(update={step.kind: step.work.model_copy(update=found)}))
    recipe = recipe.model_copy(update={"steps": tuple(steps)})
    if recipe.bench is None:
        return recipe
    text = _found(recipe.bench.text, document.place(("bench", "text")))
    return recipe.model_copy(update={"bench": recipe.bench.model_copy(update={"text": text})})


def _beside(name: str, place: Place) -> str:
    """A file that is named relative to the recipe."""
    found = place.folder / name
    if not found.is_file():
        hint = "llmopt probe -o cluster.yaml writes one"
        raise RecipeError(f"there is no file {str(found)!r}", where=str(place), hint=hint)
    return str(found)


def _found(text: str | None, place: Place) -> str | None:
    """What is here wins over the Hub; whether a dataset is there, is found when it is read."""
    if text is None:
        return None
    found = place.folder / text
    if found.is_file():
        return str(found)
    name, colon, parts = text.partition(":")
    if (place.folder / name).is_dir():
        return f"{place.folder / name}{colon}{parts}"
    if could_be_on_the_hub(text):
        return text
    raise RecipeError(
        f"there is no file {str(found)!r}", where=str(place), hint=f"give a .txt or .jsonl file, or {SYNTAX}"
    )
