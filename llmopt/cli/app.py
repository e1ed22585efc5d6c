"""The command line: which commands there are, and the flags that stand before them.

Each command is a file beside this one. Nothing heavy is imported here or at the top of those files: `--help` answers
before torch would have been found.
"""

import os
from typing import Annotated

import typer

import llmopt
from llmopt.cli import recipe
from llmopt.cli.bench import bench
from llmopt.cli.demo import demo
from llmopt.cli.generate import generate
from llmopt.cli.inspect import inspect
from llmopt.cli.launch import launch
from llmopt.cli.partition import partition
from llmopt.cli.probe import probe
from llmopt.cli.processes import before_command
from llmopt.cli.quantize import quantize
from llmopt.cli.run import run
from llmopt.cli.streams import write_out
from llmopt.errors import DEBUG_VARIABLE

# Help that nobody asked for at one level is None unless said here, and typer imports pydantic to find out that None is
# no bool: that takes longer than all else `llmopt COMMAND --help` needs.
_NO_HELP = {"help": False}

# Without rich's panels, which take as long again.
app = typer.Typer(
    name="llmopt",
    help=llmopt.__doc__,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "default_map": _NO_HELP | {"recipe": _NO_HELP}},
)
for command in (demo, inspect, quantize, bench, probe, partition, launch, run, generate):
    app.command()(command)
app.add_typer(recipe.app, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        write_out(f"llmopt {llmopt.__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    before_command(context.invoked_subcommand)
    if context.invoked_subcommand is None:
        write_out(context.get_help() + "\n")
