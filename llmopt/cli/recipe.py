"""`llmopt recipe`: check a recipe, or print the schema that editors check it with."""

from pathlib import Path
from typing import Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Json, Settings
from llmopt.cli.streams import write_out

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
    """Check a recipe without running it, and print what it says, defaults included."""
    from llmopt.cli.vocabulary import vocabulary
    from llmopt.recipe import load_recipe

    recipe = load_recipe(file, vocabulary=vocabulary(), assignments=settings or ())
    names = ", ".join(step.quantize.name for step in recipe.steps)
    Console(json=json).result(
        recipe.model_dump(mode="json", by_alias=True),
        f"{file}: {recipe.model} to {names}, {len(recipe.gates)} gates",
    )
