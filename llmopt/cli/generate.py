"""`llmopt generate`: say something with an artifact or a model, the quickest check that it is sane."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Json, Quiet, Revision, Seed, Threads, TrustRemoteCode, thread_count
from llmopt.cli.streams import write_out

if TYPE_CHECKING:
    from llmopt.pipeline.generate import GenerateRequest


def generate(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT", help="An artifact's folder, or a model.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer or continue; - reads it from stdin.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="Stop after so many tokens.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.0, metavar="X", help="0 takes the most likely token; higher is more varied."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", min=0.0, max=1.0, metavar="P", help="Choose among the likeliest tokens of this share."),
    ] = 1.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template (default: if the model has one)."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message of a chat.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text, shown as it comes.

    Example: llmopt generate demo-int4 "In the morning" --max-tokens 60
    """
    from llmopt.pipeline.generate import GenerateRequest
    from llmopt.pipeline.generate import generate as do_generate

    text = read_prompt(prompt)
    console = Console(json=json, quiet=quiet)
    request = GenerateRequest(
        model=model,
        prompt=text,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        chat=chat,
        system=system,
        revision=revision,
        trust_remote_code=trust_remote_code,
        seed=seed or 0,
        threads=thread_count(threads),
    )
    pieces = do_generate(request, console.progress)
    if json:
        console.result(as_object(request, "".join(pieces)), "")
        return
    for piece in pieces:
        write_out(piece)
    write_out("\n")


def read_prompt(prompt: str) -> str:
    """The prompt as typed, or from standard input without the line end that `echo` puts behind it.

    Raises:
        UsageError: it is not UTF-8.
    """
    from llmopt.errors import UsageError

    try:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        text.encode()  # bytes of an argument that are no text come as lone surrogates
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text", hint="convert it: iconv -f LATIN1 -t UTF-8") from error
    return text


def as_object(request: "GenerateRequest", text: str) -> dict[str, object]:
    """The answer with its question, for `--json`."""
    return {"schema": "llmopt.generation/1", "model": request.model, "prompt": request.prompt, "text": text}
