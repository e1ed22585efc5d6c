"""What every checkpoint of quantized weights asks of a model and its schemes, seen to before a weight is read."""

from collections.abc import Iterator, Mapping

from llmopt.errors import UnsupportedError, UsageError
from llmopt.model.spec import Linear, ModelSpec
from llmopt.quantize.assign import Assignment
from llmopt.quantize.scheme import Scheme

Assignments = Mapping[str, Assignment]


def quantized(spec: ModelSpec, assignments: Assignments) -> Iterator[tuple[Linear, Scheme]]:
    """The linears that get a scheme."""
    for linear in spec.linears():
        scheme = assignments[linear.name].scheme
        if scheme is not None:
            yield linear, scheme


def require_linears(spec: ModelSpec, format_name: str) -> None:
    """See that the model's linears are such as the readers of these checkpoints replace.

    Raises:
        UnsupportedError: they are stored the other way round, in a module of their own kind.
    """
    if any(linear.transposed for linear in spec.linears()):
        raise UnsupportedError(
            f"{spec.family} has Conv1D modules where others have linears, and readers of format {format_name} "
            "quantize linears alone",
            hint="--format onnx",
        )


def require_float_tables(spec: ModelSpec, assignments: Assignments, format_name: str) -> None:
    """See that no scheme is asked for where a table is looked up.

    Raises:
        UsageError: an override names the embedding, or a head that is tied to it.
    """
    table = spec.embedding.name
    if assignments[table].scheme is None:
        return
    names = f"{table} and {spec.head.name}, which are tied," if spec.tied else table
    raise UsageError(
        f"format {format_name} keeps {names} as stored, and an override asks for {assignments[table].scheme}",
        hint="leave that override out, or take --format onnx",
    )


def require_fused_alike(spec: ModelSpec, assignments: Assignments) -> None:
    """See that what engines multiply at once has one scheme: queries, keys and values; gate and up.

    Raises:
        UsageError: naming those that differ.
    """
    for block in spec.blocks:
        for linears in (block.attention.inputs, block.mlp.inputs):
            schemes = {linear.name: assignments[linear.name].scheme for linear in linears}
            if len(set(schemes.values())) > 1:
                pairs = ", ".join(f"{name}: {scheme or 'none'}" for name, scheme in schemes.items())
                raise UsageError(
                    f"engines multiply these at once, so they need one scheme; they have {pairs}",
                    hint="name all of them with one pattern, such as '*.q_proj', '*.k_proj' and '*.v_proj'",
                )


def require_divisible(linear: Linear, scheme: Scheme, *, inputs: int, outputs: int) -> None:
    """See that a weight can be cut into whole groups and words.

    Raises:
        UnsupportedError: it cannot.
    """
    for features, divisor, what in (
        (linear.in_features, scheme.group_size or 1, f"groups of {scheme.group_size}"),
        (linear.in_features, inputs, f"what the format holds {inputs} of together"),
        (linear.out_features, outputs, f"what the format holds {outputs} of together"),
    ):
        if features % divisor:
            raise UnsupportedError(
                f"{linear.name} is {linear.out_features} × {linear.in_features}, and {features} does not divide into "
                f"{what}, which {scheme.name} asks for",
                hint=f"another group size or -channel, --ignore {linear.name}, or --format onnx",
            )
