"""Mixed schemes: from a budget to the scheme of every layer, and what the artifact that came of it really lost."""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.calibrate.text import Corpus, split
from llmopt.calibrate.windows import TokenWindows, windows
from llmopt.errors import BudgetError, UsageError
from llmopt.measure.size import model_bytes
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import ModelSource
from llmopt.model.spec import ModelSpec
from llmopt.model.storage import float_bytes
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.calibration_text import CalibrationText
from llmopt.pipeline.heldout import HeldOutLoss, measure_loss
from llmopt.pipeline.sensitivity import Losses, Sensitivity
from llmopt.precision.allocate import Option
from llmopt.precision.budget import Budget, PerplexityBudget, SizeBudget
from llmopt.precision.explain import explain, plan_json
from llmopt.precision.groups import Group
from llmopt.precision.plan import LOG_PERPLEXITY_PER_KL, Correction, Plan, Problem, require_reachable, solve
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment, Override, matches
from llmopt.quantize.scheme import Scheme

FITTED_SHARE = 0.9  # of the text; the rest is held out to measure on
WINDOW = 512
# The sensitivity is estimated on as many windows as this keeps the hidden states of, between the two: a few labels
# that were not likely decide much of it, and the more are drawn, the better it is.
KEPT_BYTES, FEWEST, MOST = 2**28, 8, 32
HELD_OUT_WINDOWS = 8
ROUNDS = 3  # artifacts that are made at most until one is within the budget
# What a graph takes beside its weights, alignment and all; more than it does, so that a budget is met at once.
GRAPH_BYTES, BLOCK_BYTES = 6_000, 7_000
MARGIN = 1.02  # on a measured loss, that the next plan may keep to the bound

# What each method leaves of the loss that the search is estimated to leave, measured on SmolLM2-135M; of a method that
# is not here, all of it. What there will be time for is not known, so `auto` counts as what it is at least.
LEFT_BY_METHOD: Mapping[str, float] = {"rtn": 1.35, "search": 1.0, "gptq": 0.4, "auto": 0.4, "reconstruct": 0.3}
# The same for a table that serves as the head; others have no inputs to be fitted to.
LEFT_OF_TIED_TABLE: Mapping[str, float] = {"gptq": 0.3, "auto": 0.3, "reconstruct": 0.3}


class ExceededError(BudgetError):
    """An artifact was made and is not within its budget; `correction` is what it taught."""

    def __init__(self, what: str, correction: Correction) -> None:
        super().__init__(what, hint="a larger budget, or a method that loses less: --method gptq")
        self.correction = correction

    def __reduce__(self) -> tuple[type["ExceededError"], tuple[str, Correction]]:
        """As it goes from one process to others."""
        return ExceededError, (self.what, self.correction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What a plan is made from: the model in groups, and text to fit to and to measure on."""

    source: ModelSource
    budget: Budget
    groups: tuple[Group, ...]
    fitted: Corpus
    held_out: Corpus
    overhead_bytes: int  # see the function of that name
    method: str
    seed: int
    threads: int

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.source.spec

    def require_reachable(self) -> None:
        """See that the smallest schemes are within the budget, before a weight is read.

        Raises:
            BudgetError: they are not.
        """
        require_reachable(self.groups, self.overhead_bytes, self.budget)

    def plan(self, progress: Progress) -> Plan:
        """Estimate what each scheme costs each group, and solve.

        Raises:
            LlmoptError: the weights are damaged, or nothing is within the budget.
        """
        torch.set_num_threads(self.threads)
        return solve(self._problem(self._losses(progress)), self.budget)

    def check(self, plan: Plan, folder: Path, progress: Progress) -> HeldOutLoss:
        """Hold an artifact against the budget that it was made for.

        Raises:
            ExceededError: it is larger, or loses more.
        """
        size = model_bytes(folder)
        assert size is not None
        if isinstance(self.budget, SizeBudget) and size > self.budget.model_bytes:
            more = plan.correction.more_bytes + size - self.budget.model_bytes
            raise ExceededError(
                f"the model files take {size:,} bytes, more than {self.budget}",
                dataclasses.replace(plan.correction, more_bytes=more),
            )
        text = even(self._windows(self.held_out, Tokenizer.from_folder(folder), HELD_OUT_WINDOWS), HELD_OUT_WINDOWS)
        found = measure_loss(self.source, folder, text, threads=self.threads, seed=self.seed, progress=progress)
        if isinstance(self.budget, PerplexityBudget) and found.perplexity.relative > self.budget.relative:
            foreseen = plan.predicted_kl * LOG_PERPLEXITY_PER_KL
            factor = plan.correction.more_loss * MARGIN * math.log1p(found.perplexity.relative) / foreseen
            raise ExceededError(
                f"the perplexity is {found.perplexity.relative:+.2%} on {found.kl.n} held-out tokens, "
                f"and {self.budget} was asked for",
                dataclasses.replace(plan.correction, more_loss=factor),
            )
        return found

    def _losses(self, progress: Progress) -> Mapping[Group, Losses]:
        with tempfile.TemporaryDirectory(prefix="llmopt-") as name:
            self.source.write_tokenizer(Path(name))
            tokenizer = Tokenizer.from_folder(Path(name))
        text = self._windows(self.fitted, tokenizer, 2 * MOST)
        self._windows(self.held_out, tokenizer, HELD_OUT_WINDOWS)  # too short a text is told now, not in the end
        kept_bytes = 4 * len(text.ids[0]) * self.spec.hidden_size * (len(self.spec.blocks) + 1)
        chosen = even(text, min(max(FEWEST, KEPT_BYTES // kept_bytes), MOST))
        with (
            open_checkpoint(self.source) as checkpoint,
            progress.task("what each scheme would cost", total=2 * len(self.spec.blocks) + 2) as task,
        ):
            ids_BT = np.minimum(np.stack(chosen.ids), self.spec.vocab_size - 1)
            return Sensitivity(self.spec, checkpoint, self.groups, ids_BT, self.seed).measure(task)

    def _problem(self, losses: Mapping[Group, Losses]) -> Problem:
        options = tuple(
            tuple(
                Option(stored_bytes=group.stored_bytes(scheme), loss=loss * self._left(group))
                for scheme, loss in zip(group.candidates, losses[group], strict=True)
            )
            for group in self.groups
        )
        return Problem(groups=self.groups, options=options, overhead_bytes=self.overhead_bytes)

    def _left(self, group: Group) -> float:
        if self.spec.embedding.name in group.layers:
            return LEFT_OF_TIED_TABLE.get(self.method, 1.0) if self.spec.tied else 1.0
        return LEFT_BY_METHOD.get(self.method, 1.0)

    def _windows(self, corpus: Corpus, tokenizer: Tokenizer, count: int) -> TokenWindows:
        length = min(WINDOW, longest_sequence(self.spec))
        return windows(corpus, tokenizer, length, count * length)


def require_float_activations(scheme: Scheme) -> None:
    """See that a scheme leaves something to choose.

    Raises:
        UsageError: it rounds activations, which one scheme alone does.
    """
    if scheme.activation_bits == 8:
        raise UsageError(
            f"a budget chooses among schemes with float activations, and {scheme.name} rounds them",
            hint="leave --scheme out; --override gives some layers w8a8",
        )


def divided(text: CalibrationText) -> tuple[CalibrationText, Corpus]:
    """What is fitted to, and what is held out to measure on.

    Raises:
        UsageError: there is too little text to divide.
    """
    fitted, held_out = split(text.corpus, FITTED_SHARE)
    return dataclasses.replace(text, corpus=dataclasses.replace(fitted, name=text.corpus.name)), held_out


def fixed_layers(
    spec: ModelSpec, assignments: Mapping[str, Assignment], overrides: Sequence[Override], ignore: Sequence[str]
) -> dict[str, Scheme | None]:
    """The layers that a pattern names, and what they get. A tied pair is fixed where one of the two is."""
    patterns = [*ignore, *(pattern for pattern, _ in overrides)]
    names = {name for name in assignments if any(matches(pattern, name) for pattern in patterns)}
    tables = {spec.embedding.name, spec.head.name}
    if spec.tied and names & tables:
        names |= tables
    return {name: assignments[name].scheme for name in names}


def planned(assignments: Mapping[str, Assignment], plan: Plan) -> dict[str, Assignment]:
    """The assignments with a plan's schemes where there was a choice."""
    schemes = plan.schemes()
    free = {layer for group in plan.problem.groups if len(group.candidates) > 1 for layer in group.layers}
    reason = f"the least predicted loss within {plan.budget}"
    if isinstance(plan.budget, PerplexityBudget):
        reason = f"the fewest bytes with a predicted loss within {plan.budget}"
    return {
        name: Assignment(name=name, scheme=schemes[name], reason=reason) if name in free else assignment
        for name, assignment in assignments.items()
    }


def overhead_bytes(spec: ModelSpec) -> int:
    """What model files take beside the weights of linears and table: what stays float, and the graph."""
    return float_bytes(spec) + GRAPH_BYTES + BLOCK_BYTES * len(spec.blocks)


def even(text: TokenWindows, count: int) -> TokenWindows:
    """At most so many of the windows that are as long as the first, evenly spread over the text."""
    full = [index for index, ids in enumerate(text.ids) if len(ids) == len(text.ids[0])]
    chosen = [full[round(place)] for place in np.linspace(0, len(full) - 1, min(count, len(full)))]
    return dataclasses.replace(
        text, ids=tuple(text.ids[index] for index in chosen), cluster=tuple(text.cluster[index] for index in chosen)
    )


def outcome_json(plan: Plan, found: HeldOutLoss) -> dict[str, Any]:
    """Predicted and measured, as a report holds them."""
    return plan_json(plan, explain(plan)) | {"measured": found.to_json()}


def outcome_note(plan: Plan, found: HeldOutLoss) -> str:
    """Predicted beside measured, in a sentence."""
    change = found.perplexity
    interval = "" if change.low is None or change.high is None else f" [{change.low:+.1%}, {change.high:+.1%}]"
    return (
        f"{plan.budget}: KL divergence predicted {plan.predicted_kl:.4f}, measured {found.kl.value:.4f} nats; "
        f"perplexity predicted {plan.predicted_perplexity:+.1%} (its logarithm taken as {LOG_PERPLEXITY_PER_KL} of the "
        f"KL divergence), measured {change.relative:+.1%}{interval}, on {found.kl.n} tokens that were not fitted to"
    )
