"""`llmopt recipe`: check a recipe, or print the schema that editors check it with."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Json, Settings
from llmopt.cli.streams import write_out
from llmopt.words import counted

app = typer.Typer(help="Check a recipe, or print the JSON Schema of recipes.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from llmopt.artifact import to_json_text
    from llmopt.recipe import json_schema

    write_out(to_json_text(json_schema()))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Check a recipe without running it.

    What it says is printed, defaults included.
    """
    from llmopt.cli.vocabulary import vocabulary
    from llmopt.recipe import load_recipe

    recipe = load_recipe(file, vocabulary=vocabulary(), assignments=settings or ())
    names = ", ".join(step.work.name for step in recipe.steps)
    content = recipe.model_dump(mode="json", by_alias=True)
    summary = f"# {file}: {recipe.model} to {names}, {counted(len(recipe.gates), 'gate')}"
    Console(json=json).result(content, lambda on: on.out(f"{summary}\n{_as_yaml(content)}", highlight=False, end=""))


def _as_yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
