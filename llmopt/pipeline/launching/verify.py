"""A launched run held against a single process.

That one reads the prompts and the launched tokens in one go. Where its likeliest token behind every place is the
launched one, it would have generated the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmopt.engine.torch import Tensors, TorchEngine
from llmopt.errors import VerificationError
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import ModelSource
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.rank import Outcome
from llmopt.pipeline.launching.result import Verified
from llmopt.pipeline.launching.weights import ReferenceTensors, parse_schemes, reference_linears
from llmopt.pipeline.stored_weights import open_stored
from llmopt.quantize.scheme import parse_scheme

LOGIT_TOLERANCE = 1e-4
# ‖Δ‖ / ‖logits‖ where numbers are rounded on their way: sums in another order round to other neighbours.
ROUNDED_TOLERANCE = {"float16": 0.01, "bfloat16": 0.05}
INT8_TOLERANCE = 0.05


def verified(job: Job, outcome: Outcome, source: ModelSource) -> Verified:
    """Compare every token and every logit.

    Raises:
        VerificationError: a token differs, or a logit by more than `LOGIT_TOLERANCE`; of a run that rounds activations,
            only logits that differ by more than rounding explains.
    """
    assert outcome.logits_BTV is not None
    schemes = parse_schemes(source.spec, job.schemes)
    whole_BT = torch.cat([torch.tensor(job.ids_BT), outcome.ids_BT], 1)[:, :-1]
    with _tensors(job, source) as tensors, torch.inference_mode():
        linears = reference_linears(schemes, symmetric=job.symmetric)
        engine = TorchEngine(source.spec, tensors, linears=linears)
        expected_BTV = engine.logits_behind(whole_BT, len(job.ids_BT[0]) - 1)
    difference_BTV = outcome.logits_BTV - expected_BTV
    found = Verified(
        tokens_equal=torch.equal(expected_BTV.argmax(-1), outcome.ids_BT),
        largest_difference=float(difference_BTV.abs().max()),
        relative_error=float(difference_BTV.norm() / expected_BTV.norm()),
    )
    _require(found, job, rounds=any(scheme.activation_bits == 8 for _, scheme in schemes.values()))
    return found


@contextmanager
def _tensors(job: Job, source: ModelSource) -> Iterator[Tensors]:
    """What codes stand for: those of the model itself, or of what is rounded as it is read."""
    if job.stored is not None:
        with open_stored(source, {name: parse_scheme(text) for name, text in job.schemes.items()}) as stored:
            yield stored
        return
    with open_checkpoint(source) as checkpoint:
        yield ReferenceTensors(checkpoint, parse_schemes(source.spec, job.schemes))


def _require(found: Verified, job: Job, *, rounds: bool) -> None:
    if rounds or job.dtype in ROUNDED_TOLERANCE:
        allowed = max(ROUNDED_TOLERANCE.get(job.dtype, 0.0), INT8_TOLERANCE if rounds else 0.0)
        good = found.relative_error <= allowed
    else:
        good = found.tokens_equal and found.largest_difference <= LOGIT_TOLERANCE
    if not good:
        same = "the same tokens as" if found.tokens_equal else "other tokens than"
        raise VerificationError(
            f"the ranks generate {same} a single process, and logits that differ by up to "
            f"{found.largest_difference:.2g}, {found.relative_error:.2g} of their norm",
            hint="please report it, with the plan",
        )
