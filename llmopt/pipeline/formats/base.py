"""What a format is: what it can hold, a writer that parts are streamed into, and a way to check the result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from llmopt.model.source import ModelSource
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.verify import References, Verification
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment, TableRule
from llmopt.quantize.execute import Rounding
from llmopt.quantize.grid import ScaleRule

Assignments = Mapping[str, Assignment]


class Writer(Protocol):
    """The files of one artifact, written part by part. Each part comes back as it will be read again."""

    def embedding(self, weights: Weights) -> Weights:
        """Write the token table, and learned positions."""
        ...

    def block(self, block: Block, weights: Weights) -> Weights:
        """Write one block."""
        ...

    def head(self, weights: Weights) -> Weights:
        """Write the final norm and the head."""
        ...

    def save(self) -> None:
        """Write what comes last."""
        ...

    def close(self) -> None:
        """Let the files go, whatever is in them."""
        ...


class Format(Protocol):
    """One format. `engine` is the program that opens it, `rounding` what that does to 8-bit activations."""

    @property
    def name(self) -> str:
        """The word that people type and manifests hold."""
        ...

    @property
    def engine(self) -> str:
        """The program that opens it."""
        ...

    @property
    def tables(self) -> TableRule:
        """What the embedding and the head get."""
        ...

    @property
    def rounding(self) -> Rounding:
        """How activations are rounded where a scheme says so."""
        ...

    @property
    def before_head(self) -> bool:
        """Whether it can hold a product before the head, which no model has as it is published."""
        ...

    def scales(self, spec: ModelSpec) -> ScaleRule:
        """What scales of weights may be."""
        ...

    def check(self, spec: ModelSpec) -> None:
        """See that such a model can be written, and opened here afterwards.

        Raises:
            LlmoptError: it cannot, or a package is missing.
        """
        ...

    def check_layers(self, spec: ModelSpec, assignments: Assignments) -> None:
        """See that layers can have these schemes.

        Raises:
            UsageError: naming the first that cannot.
        """
        ...

    def estimated_bytes(self, spec: ModelSpec, assignments: Assignments) -> int:
        """What the weights take on disk, before any is read."""
        ...

    def verification_bytes(
        self, spec: ModelSpec, assignments: Assignments, output_bytes: int, logits_bytes: int
    ) -> int:
        """What `verify` takes of memory, where model files and the reference's logits take so much."""
        ...

    def write_companions(self, source: ModelSource, assignments: Assignments, folder: Path) -> None:
        """Write what lies beside the weights, except for the tokenizer."""
        ...

    def writer(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> Writer:
        """Begin to write the weights."""
        ...

    def verify(self, folder: Path, references: References, threads: int, progress: Progress) -> Verification:
        """Open what was written, and hold it against the references.

        Raises:
            VerificationError: it computes something else.
        """
        ...

    def finish(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> None:
        """Decide what is decided by running what was written, once it is known to be right."""
        ...
