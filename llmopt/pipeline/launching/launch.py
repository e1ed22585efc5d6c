"""`llmopt launch`: from a plan to tokens, checked and measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from llmopt.engine.torch import TorchEngine
from llmopt.errors import LlmoptError, ModelError, UsageError, VerificationError
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.parallel import tensor_parallel, tensor_parallel_degrees
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import ModelSource, open_source
from llmopt.model.tokenizer import Tokenizer
from llmopt.partition.runtime.schedule import micro_batches
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.planned import Planned, read_plan
from llmopt.pipeline.launching.rank import Outcome
from llmopt.pipeline.launching.result import Compared, LaunchResult, Verified, latencies_ms, stage_results
from llmopt.pipeline.launching.run import outcome_of, run_job
from llmopt.pipeline.launching.shards import MANIFEST, materialize, require_shards
from llmopt.pipeline.ranks import place
from llmopt.progress import Progress
from llmopt.words import counted

LOGIT_TOLERANCE = 1e-4


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
    plan = read_plan(request.plan)
    under_torchrun = place() != (0, 1)
    source = _source(plan, request)
    _require_legal(plan, source)
    ids_BT = _prompts(plan, request, source)
    if request.materialize is not None and not under_torchrun:
        materialize(source, plan.layout, plan.hash, request.materialize, progress)
    elif request.materialize is not None:
        require_shards(request.materialize, plan.layout, plan.hash, place()[0])
    job = Job(
        model=plan.model,
        revision=plan.revision,
        layout=plan.layout,
        ids_BT=ids_BT,
        output=plan.workload.output,
        cut=micro_batches(plan.micro_batches, len(ids_BT), len(ids_BT[0])),
        rounds=request.rounds,
        keep_logits=request.verify,
        timeout_s=request.timeout_s,
        shards=None if request.materialize is None else str(request.materialize),
        plan_hash=plan.hash,
    )
    if under_torchrun:
        outcome = outcome_of(job, fail)
    else:
        with progress.task(f"running {counted(plan.layout.size, 'rank')}"):
            outcome = run_job(job, pinned=request.pinned)
    return None if outcome is None else _result(plan, request, job, outcome, source)


def _source(plan: Planned, request: LaunchRequest) -> ModelSource:
    """The model; or, where shards are there, what they say of it."""
    if request.materialize is not None and (request.materialize / MANIFEST).is_file() and not request.verify:
        return open_source(str(request.materialize), weights=False)
    return open_source(plan.model, revision=plan.revision)


def _require_legal(plan: Planned, source: ModelSource) -> None:
    spec = source.spec
    plan.layout.require(len(spec.blocks))
    for number, stage in enumerate(plan.stages):
        found = tensor_parallel(spec, stage.tp)
        if not found.legal:
            legal = ", ".join(str(each.degree) for each in tensor_parallel_degrees(spec) if each.legal)
            what = f"stage {number} cannot be cut over {stage.tp} ranks: {found.obstacle}"
            raise UsageError(what, where=str(source.name), hint=f"legal degrees: {legal}")


def _prompts(plan: Planned, request: LaunchRequest, source: ModelSource) -> tuple[tuple[int, ...], ...]:
    """Token ids, one row a sequence of the plan's batch."""
    work = plan.workload
    if request.prompt is None:
        drawn = np.random.default_rng(request.seed).integers(0, source.spec.vocab_size, (work.batch, work.prompt))
        rows = tuple(tuple(int(token) for token in row) for row in drawn)
    else:
        tokenizer = _tokenizer(source)
        if tokenizer is None:
            raise UsageError("the model has no tokenizer for --prompt", hint="leave it out")
        ids = tokenizer.encode(request.prompt)
        ids = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least a word")
        rows = (tuple(ids),) * work.batch
    longest = longest_sequence(source.spec)
    if len(rows[0]) + work.output > longest:
        what = f"{len(rows[0])} tokens of prompt and {work.output} of output, where the model reads {longest}"
        raise UsageError(what, hint="plan for fewer")
    return rows


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    with TemporaryDirectory() as folder:
        try:
            source.write_tokenizer(Path(folder))
        except ModelError:
            return None
        return Tokenizer.from_folder(Path(folder))


def _result(plan: Planned, request: LaunchRequest, job: Job, outcome: Outcome, source: ModelSource) -> LaunchResult:
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
        stages=stage_results(plan, outcome, as_planned=as_planned),
        rounds=request.rounds,
        verified=_verified(job, outcome, source) if request.verify else None,
    )


def _verified(job: Job, outcome: Outcome, source: ModelSource) -> Verified:
    """Hold the run against one process that reads prompts and launched tokens in one go.

    Where its likeliest token behind every place is the launched one, it would have generated the same.

    Raises:
        VerificationError: a token differs, or a logit by more than `LOGIT_TOLERANCE`.
    """
    assert outcome.logits_BTV is not None
    whole_BT = torch.cat([torch.tensor(job.ids_BT), outcome.ids_BT], 1)[:, :-1]
    with open_checkpoint(source) as checkpoint, torch.inference_mode():
        expected_BTV = TorchEngine(source.spec, checkpoint).logits_behind(whole_BT, len(job.ids_BT[0]) - 1)
    difference = float((outcome.logits_BTV - expected_BTV).abs().max())
    equal = torch.equal(expected_BTV.argmax(-1), outcome.ids_BT)
    if not equal or difference > LOGIT_TOLERANCE:
        what = "other tokens than" if not equal else "the same tokens as"
        raise VerificationError(
            f"the ranks generate {what} a single process, and logits that differ by up to {difference:.2g}",
            hint="please report it, with the plan",
        )
    return Verified(tokens_equal=equal, largest_difference=difference)
