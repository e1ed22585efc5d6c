"""What a cast needs of memory and disk, before a weight is read."""

from llmopt.measure.memory import resident_bytes
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.calibration_text import WINDOW
from llmopt.pipeline.estimate import LOGITS, PROGRAM_BYTES, SCORES, Estimate
from llmopt.pipeline.formats.cast import CastFormat
from llmopt.pipeline.spill import limit_bytes
from llmopt.pipeline.windows import COUNT, LENGTH

FLOAT = 4
# A weight while it is scanned: as it is, in 16 bits, and these as floats.
SCANNED_BYTES = FLOAT + 2 + FLOAT
WIDE = 4  # copies of what is inside an MLP: both of its sides, in float32 and as 16 bits have them


def estimate_cast(spec: ModelSpec, format_: CastFormat, tokens: int, output_bytes: int) -> Estimate:
    """The estimate, for this process as it is now, where model files will take so much."""
    table = sum(tensor.count for tensor in spec.embedding.tensors())
    hidden_bytes, limit = FLOAT * tokens * spec.hidden_size, limit_bytes()
    logits_bytes = LOGITS * FLOAT * COUNT * LENGTH * spec.vocab_size
    return Estimate(
        resident_bytes=resident_bytes(),
        held_bytes=PROGRAM_BYTES + FLOAT * table,
        steps={
            "a block": _block_bytes(spec) + min(hidden_bytes, limit),
            "the head": SCANNED_BYTES * spec.head.weight.count + 2 * FLOAT * WINDOW * spec.vocab_size,
            "verification": format_.verification_bytes(spec, output_bytes, logits_bytes),
        },
        output_bytes=output_bytes,
        journal_bytes=0,
        spilled_bytes=max(0, hidden_bytes - limit),
    )


def _block_bytes(spec: ModelSpec) -> int:
    weights = max(sum(tensor.count for tensor in block.tensors()) for block in spec.blocks)
    inside = max(WIDE * block.mlp.size + SCORES * block.attention.heads * WINDOW for block in spec.blocks)
    return SCANNED_BYTES * weights + FLOAT * WINDOW * inside
