"""`llmopt launch`: from a plan to tokens, checked and measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmopt.errors import LlmoptError, ModelError, UsageError
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import ModelSource
from llmopt.model.tokenizer import Tokenizer
from llmopt.partition.degrees import legal_degrees, shared_by
from llmopt.partition.plan import Plan, read_plan
from llmopt.partition.runtime.schedule import micro_batches
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.plans import cluster_of, device_of, hash_of, layout_of
from llmopt.pipeline.launching.rank import Outcome
from llmopt.pipeline.launching.result import Compared, LaunchResult, latencies_ms, stage_results
from llmopt.pipeline.launching.run import DTYPES, outcome_of, run_job
from llmopt.pipeline.launching.shards import MANIFEST, materialize, require_shards, shards_format
from llmopt.pipeline.launching.verify import verified
from llmopt.pipeline.launching.weights import parse_schemes
from llmopt.pipeline.ranks import place
from llmopt.pipeline.stored import Format, open_model, stored_format, stored_schemes
from llmopt.progress import Progress
from llmopt.quantize.scheme import Scheme, parse_scheme
from llmopt.words import counted

FLOAT = "float32"
_MOST_TOKENS = 1 << 24  # of all prompts together: more are a mistake in a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """What to run. Without a `prompt` it is the plan's workload, of tokens drawn from the `seed`."""

    plan: Path
    prompt: str | None = None
    verify: bool = False
    materialize: Path | None = None
    rounds: int = 3
    timeout_s: float = 60.0
    pinned: bool = True
    seed: int = 0


def launch(request: LaunchRequest, progress: Progress, fail: Callable[[LlmoptError], None]) -> LaunchResult | None:
    """Run a plan: in processes of this machine, or, started by torchrun, as one of its ranks.

    Args:
        request: what to run.
        progress: where it is announced.
        fail: ends this process, from another thread; only of use under torchrun.

    Returns:
        What the first rank found; None on the others.

    Raises:
        UsageError: the plan is none, is for another model, or cuts what cannot be cut.
        VerificationError: `verify` found something else than a single process says.
        LlmoptError: a rank failed, died or hung; or shards are missing, or those of another plan.
    """
    plan, rank = read_plan(request.plan), place()
    source = _source(plan, request)
    _require_possible(plan, source, request)
    shares = _shares(plan) if request.pinned else None
    job = _job(plan, request, source)
    if plan.replicas > 1:
        progress.say(f"the plan has {plan.replicas} replicas: this is one of them")
    if rank != (0, 1):
        outcome = outcome_of(job, fail)
    else:
        if request.materialize is not None:
            materialize(
                source, job.layout, job.plan_hash, request.materialize, progress, schemes=stored_schemes(source)
            )
        with progress.task(f"running {counted(job.layout.size, 'rank')}"):
            outcome = run_job(job, shares=shares)
    return None if outcome is None else _result(plan, request, job, outcome, source)


def _shares(plan: Plan) -> int:
    """Into how many devices the plan's cluster divides the machine that its first device is."""
    machine = device_of(plan, plan.stages[0].devices[0]).node
    return sum(cluster_of(plan).machine(machine).devices.values())


def _job(plan: Plan, request: LaunchRequest, source: ModelSource) -> Job:
    ids_BT = _prompts(plan, request, source)
    return Job(
        model=plan.model,
        revision=plan.revision,
        layout=layout_of(plan),
        dtype=plan.dtype or FLOAT,
        schemes=plan.schemes,
        stored=_format(source, request),
        ids_BT=ids_BT,
        output=plan.workload.output,
        cut=micro_batches(plan.micro_batches, len(ids_BT), len(ids_BT[0])),
        rounds=request.rounds,
        keep_logits=request.verify,
        timeout_s=request.timeout_s,
        shards=None if request.materialize is None else str(request.materialize),
        plan_hash=hash_of(plan),
    )


def _source(plan: Plan, request: LaunchRequest) -> ModelSource:
    """The model; or, where shards are there, what they say of it."""
    if request.materialize is not None and (request.materialize / MANIFEST).is_file() and not request.verify:
        return open_model(str(request.materialize), weights=False)
    return open_model(plan.model, revision=plan.revision)


def _are_shards(source: ModelSource, request: LaunchRequest) -> bool:
    return request.materialize is not None and source.folder == request.materialize


def _format(source: ModelSource, request: LaunchRequest) -> Format | None:
    """The format that integers are stored in; of shards, that which they are from."""
    return shards_format(source.folder) if _are_shards(source, request) and source.folder else stored_format(source)


def _require_possible(plan: Plan, source: ModelSource, request: LaunchRequest) -> None:
    """Find out before any process is started."""
    spec, stored = source.spec, None if _are_shards(source, request) else stored_schemes(source)
    is_stored = _format(source, request) is not None
    if (plan.dtype or FLOAT) not in DTYPES:
        hint = f"plan for one of {', '.join(DTYPES)} with --dtype"
        raise UsageError(f"ranks do not compute in {plan.dtype}", where=str(request.plan), hint=hint)
    for name in (name for stage in plan.stages for name in stage.devices):
        device_of(plan, name)
    layout_of(plan).require(len(spec.blocks))
    parse_schemes(spec, plan.schemes)
    schemes = {name: parse_scheme(text) for name, text in plan.schemes.items()}
    if stored is not None and schemes != stored:
        raise UsageError(
            f"the plan is not for these weights: {_difference(schemes, stored)}",
            where=str(request.plan),
            hint="make the plan anew with llmopt partition",
        )
    for number, stage in enumerate(plan.stages):
        found = shared_by(spec, schemes, stage.tp, stored=is_stored)
        if not found.legal:
            legal = ", ".join(map(str, legal_degrees(spec, schemes, stored=is_stored)))
            what = f"stage {number} cannot be cut over {stage.tp} ranks: {found.obstacle}"
            raise UsageError(what, where=str(request.plan), hint=f"legal degrees: {legal}")
    if schemes and not is_stored and request.materialize is not None:
        hint = "llmopt quantize MODEL -o OUT --format hf, and a plan for OUT; without --materialize ranks round it"
        raise UsageError("the plan quantizes a model of floats as it is read", where=str(request.plan), hint=hint)
    if request.materialize is not None and place() != (0, 1):
        require_shards(request.materialize, layout_of(plan), hash_of(plan), place()[0])


def _difference(planned: Mapping[str, Scheme], stored: Mapping[str, Scheme]) -> str:
    """The first linear that the plan has otherwise than the model."""
    name = next(name for name in [*stored, *planned] if planned.get(name) != stored.get(name))
    said, found = (str(schemes.get(name, "no scheme")) for schemes in (planned, stored))
    return f"{name} is stored in {found}, and the plan says {said}"


def _prompts(plan: Plan, request: LaunchRequest, source: ModelSource) -> tuple[tuple[int, ...], ...]:
    """Token ids, one row for each sequence that a replica of the plan has."""
    work = plan.workload
    batch = -(-work.batch // plan.replicas)
    ids = None if request.prompt is None else _prompt_ids(request.prompt, source)
    length, longest = work.prompt if ids is None else len(ids), longest_sequence(source.spec)
    if length + work.output > longest:
        what = f"{length} tokens of prompt and {work.output} of output, where the model reads {longest}"
        raise UsageError(what, hint="plan for fewer")
    if batch * length > _MOST_TOKENS:
        what = f"{batch:,} prompts of {length} tokens, where a launch reads {_MOST_TOKENS:,} tokens at most"
        raise UsageError(what, hint="plan for a smaller batch")
    if ids is not None:
        return (tuple(ids),) * batch
    drawn = np.random.default_rng(request.seed).integers(0, source.spec.vocab_size, (batch, length))
    return tuple(tuple(int(token) for token in row) for row in drawn)


def _prompt_ids(prompt: str, source: ModelSource) -> list[int]:
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer for --prompt", hint="leave it out")
    ids = tokenizer.encode(prompt)
    ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
    if not ids:
        raise UsageError("the prompt is empty", hint="give at least a word")
    return ids


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    with TemporaryDirectory() as folder:
        try:
            source.write_tokenizer(Path(folder))
        except ModelError:
            return None
        return Tokenizer.from_folder(Path(folder))


def _result(plan: Plan, request: LaunchRequest, job: Job, outcome: Outcome, source: ModelSource) -> LaunchResult:
    tokens = tuple(tuple(int(token) for token in row) for row in outcome.ids_BT)
    as_planned = len(job.ids_BT[0]) == plan.workload.prompt
    ttft_ms, tpot_ms = latencies_ms(outcome.reports)
    tokenizer = _tokenizer(source)
    return LaunchResult(
        model=plan.model,
        tokens=tokens,
        texts=None if tokenizer is None else tuple(tokenizer.decode(list(row)) for row in tokens),
        ttft_ms=Compared(predicted=plan.predicted.ttft_ms if as_planned else None, measured=ttft_ms),
        tpot_ms=Compared(predicted=plan.predicted.tpot_ms if as_planned else None, measured=tpot_ms),
        stages=stage_results(plan, job, outcome, as_planned=as_planned),
        rounds=request.rounds,
        verified=verified(job, outcome, source) if request.verify else None,
    )
