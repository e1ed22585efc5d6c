"""`llmopt inspect`: what a model is and what it costs, from its config alone."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Json, Model, Quiet, Revision

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from llmopt.model.inspection import Inspection

# What people choose between; any other scheme's size lies between these.
SCHEMES = ("w8a16", "w8a8", "w4a16", "w4a16-g32-sym", "w4a16-g128-asym", "w4a16-g128-sym", "w2a16")


def inspect(
    model: Model,
    context: Annotated[
        int | None, typer.Option("--context", min=1, metavar="TOKENS", help="Give costs at this length (default 2048).")
    ] = None,
    revision: Revision = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a model is and costs, without reading its weights.

    Example: llmopt inspect demo --context 1024
    """
    from llmopt.model.inspection import inspect_model
    from llmopt.model.source import open_source
    from llmopt.quantize.assign import assign
    from llmopt.quantize.scheme import parse_scheme

    console = Console(json=json, quiet=quiet)
    source = open_source(model, revision=revision, weights=False, progress=console.progress)
    schemes = [parse_scheme(name) for name in SCHEMES]
    plans = {
        scheme.name: {name: item.scheme for name, item in assign(source.spec, scheme).items()} for scheme in schemes
    }
    inspection = inspect_model(source, plans, context)
    console.result(inspection.to_json(), draw(inspection))


def draw(inspection: "Inspection") -> "RenderableType":
    """The whole summary, for a terminal."""
    from rich.console import Group

    tables = (_parts(inspection), _work(inspection), _quantizable(inspection), _sizes(inspection))
    spaced = [item for table in tables for item in ("", table)]
    return Group(_identity(inspection), *spaced, "", _tensor_parallel(inspection))


def _identity(inspection: "Inspection") -> "Text":
    from rich.text import Text

    spec = inspection.spec
    attention, tied = spec.blocks[0].attention, "tied to the head" if spec.tied else "apart from the head"
    return Text.assemble(
        (inspection.name, "bold"),
        f"\n{spec.architecture}, {_count(inspection.parameters)} parameters {_stored(inspection)}\n"
        f"{len(spec.blocks)} blocks of width {spec.hidden_size}; {attention.heads} heads of {attention.head_dim}, "
        f"{attention.kv_heads} for keys and values; MLP of {spec.blocks[0].mlp.size}\n"
        f"vocabulary of {spec.vocab_size}, {tied}; context of {spec.context_length} tokens{_limits(inspection)}\n"
        f"KV cache of {_si(inspection.kv_bytes_per_token, 'B')} a token, "
        f"{_si(inspection.kv_bytes_at_context, 'B')} at {inspection.context} tokens",
    )


def _stored(inspection: "Inspection") -> str:
    if inspection.stored_bytes is None:
        return f"in {inspection.spec.dtype}"
    return "stored as " + ", ".join(f"{name} ({_si(size, 'B')})" for name, size in inspection.stored_bytes.items())


def _limits(inspection: "Inspection") -> str:
    from llmopt.model.rotary import longest_sequence

    spec, longest = inspection.spec, longest_sequence(inspection.spec)
    windows = sorted({block.attention.window for block in spec.blocks if block.attention.window is not None})
    runs = f", of which llmopt runs {longest}" if longest < spec.context_length else ""
    sees = f"; {inspection.windowed_blocks} of the blocks see the last {_words(windows)} only" if windows else ""
    return runs + sees


def _parts(inspection: "Inspection") -> "Table":
    table = _table("part", "parameters", "share", f"bytes in {inspection.spec.dtype}")
    for part in inspection.parts:
        share = f"{100 * part.parameters / inspection.parameters:.1f} %"
        table.add_row(part.name, f"{part.parameters:,}", share, _si(part.size_bytes, "B"))
    table.add_row("total", f"{inspection.parameters:,}", "", _si(inspection.size_bytes, "B"), style="bold")
    return table


def _work(inspection: "Inspection") -> "Table":
    table = _table(f"at {inspection.context} tokens", "prefill", "decode")
    prefill, decode = inspection.prefill, inspection.decode
    table.add_row("FLOPs per token", _si(prefill.flops_per_token), _si(decode.flops_per_token))
    table.add_row("bytes per token", _si(prefill.bytes_per_token, "B"), _si(decode.bytes_per_token, "B"))
    return table


def _quantizable(inspection: "Inspection") -> "Table":
    table = _table("can be quantized", "count", "out × in", "parameters")
    for group in inspection.quantizable:
        parameters = "the table's" if group.tied else f"{group.parameters:,}"
        table.add_row(group.pattern, str(group.count), f"{group.out_features} × {group.in_features}", parameters)
    return table


def _sizes(inspection: "Inspection") -> "Table":
    table = _table("quantized to", "embedding and head", "model files", f"of {inspection.spec.dtype}")
    for size in inspection.predicted_sizes:
        share = f"{100 * size.size_bytes / inspection.size_bytes:.1f} %"
        table.add_row(size.scheme, size.tables, _si(size.size_bytes, "B"), share)
    return table


def _tensor_parallel(inspection: "Inspection") -> str:
    legal = [entry.degree for entry in inspection.tensor_parallel if entry.legal]
    obstacles = [f"  not {entry.degree}: {entry.obstacle}" for entry in inspection.tensor_parallel if not entry.legal]
    return "\n".join([f"tensor-parallel degrees: {_words(legal)}", *obstacles])


def _table(first: str, *others: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _si(value: float, unit: str = "") -> str:
    """Three digits and a power of 1000: 283 M, 538 MB, 1.24 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}".rstrip()


def _count(value: int) -> str:
    """As people say it: 134.5 million, 405.9 billion."""
    return f"{value / 1e9:.1f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"


def _words(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)
