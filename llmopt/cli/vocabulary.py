"""The words of recipes that other rooms define."""

from llmopt.recipe import Vocabulary


def vocabulary() -> Vocabulary:
    """Every method, and the readers of gates and budgets."""
    from llmopt.precision.budget import parse_budget
    from llmopt.quantize.registry import check_method, check_minutes
    from llmopt.report.gates import parse_gate

    return Vocabulary(
        check_method=check_method, check_minutes=check_minutes, parse_gate=parse_gate, parse_budget=parse_budget
    )
