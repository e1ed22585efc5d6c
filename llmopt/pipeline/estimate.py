"""What a run will need of memory and disk, from the model's shapes alone, before a weight is read.

The peak is that of the greediest step, beside what every step has: the program itself and the token table. The numbers
below say how many bytes are alive at once for a weight, read off the code of the step. An estimate is meant to lie a
little above what is measured; `python -m benchmarks.memory` prints both.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.artifact import check_free_disk, journal_bytes
from llmopt.errors import ResourceError
from llmopt.measure.memory import available_bytes, resident_bytes
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.pipeline.calibration import KEPT_BYTES
from llmopt.pipeline.calibration_text import WINDOW
from llmopt.pipeline.formats.base import Assignments, Format
from llmopt.pipeline.parts import CHUNK_WEIGHTS
from llmopt.pipeline.qat.data import AT_ONCE
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.windows import COUNT, LENGTH
from llmopt.quantize.scheme import Scheme

FLOAT, DOUBLE = 4, 8
# A weight while it is fitted: itself, joined with its neighbours, ordered, its scales, zero points and codes as floats,
# and what the search of its grid tries.
FITTED_BYTES = 10 * FLOAT
# A second moment: a few times in float32, and, while it is factored, six times in float64.
MOMENT_BYTES = 4 * FLOAT + 6 * DOUBLE
# A weight while it learns: as a float, its place among the codes, its levels, the dense weight, its gradient, and what
# a step makes of that.
LEARNT_BYTES = 7 * FLOAT
# A weight while it is trained: its latent, the gradient of that, what Adam remembers, twice, the best so far, as a
# float and in codes, the gradient of the float; and in the float model. With thin matrices the moving parts are those.
TRAINED_BYTES, THIN_TRAINED_BYTES = 9 * FLOAT, 5 * FLOAT
# What of that is divided among processes; the other floats are there for one block alone.
SHARED_BYTES = 5 * FLOAT
# What is kept of a token in a block for its gradients: so many values of the width of the model, and of its MLP.
KEPT_HIDDEN, KEPT_WIDE = 14, 5
TRAINING = "training"
TRAINED_LOGITS = 7  # copies of the logits of a batch: student, teacher, the gradient, and while these are made
# What a candidate leaves while others are tried: codes, scales and zero points. And the second moment that they are all
# judged by, once it is made and while that is done.
TRIED_BYTES = 2
JUDGED_BYTES = 2 * FLOAT
# A quantized matrix that is turned into floats: codes less zero points, scales, and their product.
DENSE_BYTES = 3 * FLOAT
SCORES = 3  # copies of the scores of one window's attention: as they are, masked, and as weights
LOGITS = 3  # of all tokens that are verified: expected, actual, and what compares them
PROGRAM_BYTES = 80 * 2**20  # onnxruntime, the tokenizer, and what else a process gathers that is no weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes: of memory, what is resident already, what every step adds to that, and what each step does; of disk."""

    resident_bytes: int
    held_bytes: int
    steps: Mapping[str, int]
    output_bytes: int
    journal_bytes: int
    spilled_bytes: int = 0

    @property
    def more_bytes(self) -> int:
        """What is still to be allocated, at the peak."""
        return self.held_bytes + max(self.steps.values())

    @property
    def memory_bytes(self) -> int:
        """Resident memory at the peak."""
        return self.resident_bytes + self.more_bytes

    @property
    def disk_bytes(self) -> int:
        """Output, journal and activations that memory has no room for, as if all were there together."""
        return self.output_bytes + self.journal_bytes + self.spilled_bytes

    def memory_by_step(self) -> dict[str, int]:
        """Resident memory while each step is at its peak."""
        return {step: self.resident_bytes + self.held_bytes + extra for step, extra in self.steps.items()}

    def to_json(self) -> dict[str, Any]:
        """The form that a plan holds."""
        return {
            "memory_bytes": self.memory_bytes,
            "memory_bytes_by_step": self.memory_by_step(),
            "disk_bytes": self.disk_bytes,
            "output_bytes": self.output_bytes,
            "journal_bytes": self.journal_bytes,
            "spilled_bytes": self.spilled_bytes,
        }

    def __str__(self) -> str:
        greediest = max(self.steps, key=self.steps.__getitem__)
        parts = {"output": self.output_bytes, "journal": self.journal_bytes, "activations": self.spilled_bytes}
        disk = ", ".join(f"{_megabytes(count)} of {part}" for part, count in parts.items() if count)
        return f"needs about {_megabytes(self.memory_bytes)} of memory ({greediest} takes the most), on the disk {disk}"

    def require_room(self, output: Path) -> None:
        """See that memory and the disk of `output`, where some of the journal may be already, have it.

        Raises:
            ResourceError: they have not.
        """
        there = min(self.journal_bytes, journal_bytes(output))
        check_free_disk(output.parent, self.disk_bytes - there)
        available = available_bytes()
        if available < self.more_bytes:
            raise ResourceError(
                f"the memory has no room: about {_megabytes(self.more_bytes)} more needed, "
                f"{_megabytes(available)} available",
                hint=f"close other programs, {self._remedy()}, or use a smaller model",
            )

    def _remedy(self) -> str:
        greediest = max(self.steps, key=self.steps.__getitem__)
        return "train with --by-block" if greediest == TRAINING else "give fewer --calib-tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an estimate is made from; `tokens` are those of the calibration, None for a method that reads none."""

    spec: ModelSpec
    assignments: Assignments
    format: Format
    tokens: int | None
    folds: bool
    limit_bytes: int  # of one list of activations; more of it is on the disk
    candidates: int = 1  # methods that are tried for each linear
    refits: bool = False  # blocks, from the float model's hidden states beside the others
    training: QatOptions | None = None  # of what was quantized
    sharing: int = 1  # processes that divide what training takes

    def estimate(self, output_bytes: int) -> Estimate:
        """The estimate, for this process as it is now, where model files will take so much."""
        return Estimate(
            resident_bytes=resident_bytes(),
            held_bytes=PROGRAM_BYTES + self._held(self.spec.embedding.tensors()),
            steps={
                "the token table": self._table_step(),
                "a block": max(map(self._block_step, self.spec.blocks)),
                "the head": 0 if self.spec.tied else self._head_step(),
                **({} if self.training is None else {TRAINING: self._training_step(self.training)}),
                "verification": self.format.verification_bytes(
                    self.spec, self.assignments, output_bytes, self._logits_bytes()
                ),
            },
            output_bytes=output_bytes,
            journal_bytes=0 if self.tokens is None else self._held(self.spec.tensors()),
            spilled_bytes=sum(max(0, count - self.limit_bytes) for count in self._lists(self.spec.blocks[0])),
        )

    def _table_step(self) -> int:
        """Quantized some rows at a time, and looked up as floats."""
        (name, count), *_ = ((tensor.name, tensor.count) for tensor in self.spec.embedding.tensors())
        if self._scheme_of(name) is None:
            return FLOAT * count
        return max(DENSE_BYTES * count, FITTED_BYTES * min(count, CHUNK_WEIGHTS))

    def _block_step(self, block: Block) -> int:
        held = self._held(block.tensors())
        if self.tokens is None:
            return held + max(self._fitted_bytes([linear]) for linear in block.linears())
        attention, mlp = block.attention, block.mlp
        groups = (attention.inputs, [attention.output], mlp.inputs, [mlp.down])
        copies = 2 if self.folds else 1  # the quantized weights as floats, and the folded ones
        count = self._count(block)
        fitted = self._states_bytes(block) + max(map(self._fitted_bytes, groups))
        learnt = LEARNT_BYTES * count if self.refits else 0
        return held + copies * FLOAT * count + self._other_states_bytes(block) + max(fitted, learnt)

    def _training_step(self, options: QatOptions) -> int:
        """All parts as they were quantized; the weights that learn, and what a batch leaves for its gradients."""
        blocks = self.spec.blocks
        learning = max(blocks, key=self._count) if options.by_block else None
        weights = self._count(learning) if learning else sum(map(self._count, blocks))
        tokens = WINDOW * min(AT_ONCE, options.batch)
        values = KEPT_HIDDEN * self.spec.hidden_size + KEPT_WIDE * max(block.mlp.size for block in blocks)
        scores = SCORES * max(block.attention.heads for block in blocks) * WINDOW
        kept = FLOAT * tokens * (values + scores) * (1 if learning else len(blocks))
        # The table, and a head of its own, as floats of both models.
        ends = sum(tensor.count for tensor in self.spec.tensors()) - sum(map(self._count, blocks))
        tables = 0 if learning else 2 * FLOAT * ends
        logits = 0 if learning else TRAINED_LOGITS * FLOAT * tokens * self.spec.vocab_size
        outside = self._held(self.spec.tensors()) + logits + tables
        if self.sharing == 1:
            return outside + (THIN_TRAINED_BYTES if options.lora_rank else TRAINED_BYTES) * weights + kept
        # A share of what learns; a block that is whole, and the next, which is on its way; and what enters each block.
        stays = FLOAT * weights if options.lora_rank else SHARED_BYTES * weights // self.sharing
        entering = FLOAT * tokens * self.spec.hidden_size * len(blocks)
        return outside + stays + 2 * TRAINED_BYTES * max(map(self._count, blocks)) + kept // len(blocks) + entering

    def _count(self, block: Block) -> int:
        return sum(tensor.count for tensor in block.tensors())

    def _head_step(self) -> int:
        hidden, _ = self._lists(self.spec.blocks[-1])
        return min(hidden, self.limit_bytes) + self._fitted_bytes([self.spec.head])

    def _states_bytes(self, block: Block) -> int:
        """Activations of all tokens: before and behind a branch, and within both, for those leave memory in pieces."""
        tokens = self.tokens or 0
        hidden, heads = (min(count, self.limit_bytes) for count in self._lists(block))
        wide = FLOAT * tokens * block.mlp.size
        scores = SCORES * FLOAT * block.attention.heads * min(WINDOW, tokens) ** 2
        return 2 * hidden + heads + (wide if wide <= KEPT_BYTES else 0) + scores

    def _other_states_bytes(self, block: Block) -> int:
        """What the float model's blocks give, and what entered the quantized block, if blocks learn from that."""
        hidden, _ = self._lists(block)
        return 2 * min(hidden, self.limit_bytes) if self.refits else 0

    def _lists(self, block: Block) -> tuple[int, int]:
        """What the calibration keeps of all tokens: hidden states, and what enters the output of attention."""
        values = FLOAT * (self.tokens or 0)
        return values * self.spec.hidden_size, values * block.attention.q_size

    def _logits_bytes(self) -> int:
        """What the reference's logits take, with the head made into floats or read as such, and the engine's."""
        head = self.spec.head.weight
        held = 0 if self.spec.tied else self._held([head])
        dense = FLOAT if self._scheme_of(head.name) is None else DENSE_BYTES
        return held + dense * head.count + LOGITS * FLOAT * COUNT * LENGTH * self.spec.vocab_size

    def _fitted_bytes(self, linears: Sequence[Linear]) -> int:
        """Linears with the same inputs: fitted as one; some rows at a time where there are no inputs to fit to."""
        if self.tokens is None:
            return max(map(self._rounded_bytes, linears))
        moment_bytes = MOMENT_BYTES + JUDGED_BYTES * (self.candidates > 1)
        moment = moment_bytes * linears[0].in_features ** 2
        return moment + sum(self._weight_bytes(linear) * linear.weight.count for linear in linears)

    def _rounded_bytes(self, linear: Linear) -> int:
        count = linear.weight.count if linear.transposed else min(linear.weight.count, CHUNK_WEIGHTS)
        return self._weight_bytes(linear) * count

    def _weight_bytes(self, linear: Linear) -> int:
        if self._scheme_of(linear.weight.name) is None:
            return FLOAT
        return FITTED_BYTES + TRIED_BYTES * (self.candidates - 1)

    def _held(self, tensors: Iterable[TensorSpec]) -> int:
        """Tensors as parts and the journal have them."""
        return sum(held_bytes(tensor.shape, self._scheme_of(tensor.name)) for tensor in tensors)

    def _scheme_of(self, tensor: str) -> Scheme | None:
        layer = self.assignments.get(tensor.removesuffix(".weight"))
        return None if layer is None else layer.scheme


def held_bytes(shape: Sequence[int], scheme: Scheme | None) -> int:
    """A weight in memory: float32, or a byte a code, a float32 scale a group, and a byte a zero point."""
    count = math.prod(shape)
    if scheme is None:
        return FLOAT * count
    groups = count // shape[-1] * math.ceil(shape[-1] / (scheme.group_size or shape[-1]))
    return count + groups * (FLOAT if scheme.symmetric else FLOAT + 1)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
