"""Recipes: what to do with a model and what must come out of it, as a file that people review and CI runs."""

from llmopt.recipe.load import load_recipe
from llmopt.recipe.schema import (
    SCHEMA,
    BenchStep,
    CastStep,
    Gate,
    PartitionStep,
    QuantizeStep,
    Recipe,
    Step,
    Vocabulary,
    json_schema,
)

__all__ = [
    "SCHEMA",
    "BenchStep",
    "CastStep",
    "Gate",
    "PartitionStep",
    "QuantizeStep",
    "Recipe",
    "Step",
    "Vocabulary",
    "json_schema",
    "load_recipe",
]
