"""The quantized model as something that learns, and the float model that it learns from."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmopt.engine.blocks import Apply, RotaryTables, Turn, block_forward, embed, head_logits
from llmopt.engine.torch import TorchEngine
from llmopt.model.spec import Block, Linear, ModelSpec
from llmopt.pipeline.calibration import Weights, densify
from llmopt.quantize.execute import Rounding
from llmopt.quantize.fake import FakeQuantizedWeight, straight_through
from llmopt.quantize.weights import QuantizedWeight
from llmopt.train.distill import NO_TARGET, distillation_loss

# Makes a weight that learns of a quantized one, by its name in the checkpoint.
Learn = Callable[[str, QuantizedWeight], FakeQuantizedWeight]


class LearningBlock(nn.Module):
    """A block whose quantized weights learn; all else in it stays as it is."""

    def __init__(self, block: Block, weights: Weights, learn: Learn, rounding: Rounding) -> None:
        super().__init__()
        self.block = block
        self.rounding = rounding
        quantized = {name: one for name, one in weights.items() if isinstance(one, QuantizedWeight)}
        # Names of modules have no dots.
        self.learning = nn.ModuleDict({name.replace(".", "/"): learn(name, one) for name, one in quantized.items()})
        self.others = {name: one.clone() for name, one in weights.items() if isinstance(one, Tensor)}

    def forward(self, hidden_BTH: Tensor, turn: Turn | None) -> Tensor:
        """Hidden states behind the block."""
        return block_forward(self.block, self.others, hidden_BTH, turn, apply=self.linear)

    def learned(self) -> dict[str, FakeQuantizedWeight]:
        """The weights that learn, by their names in the checkpoint."""
        found = {}
        for name, module in self.learning.items():
            assert isinstance(module, FakeQuantizedWeight)
            found[name.replace("/", ".")] = module
        return found

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """What one of its linears gives."""
        name = linear.weight.name
        bias = self.others[f"{linear.name}.bias"] if linear.bias else None
        if name in self.others:
            return nn.functional.linear(x, self.others[name], bias)
        weight = self.learning[name.replace(".", "/")]
        assert isinstance(weight, FakeQuantizedWeight)
        if weight.weight.scheme.activation_bits == 8:
            x = straight_through(x, self.rounding(x))
        return nn.functional.linear(x, weight(), bias)


class Student(nn.Module):
    """The whole quantized model. Tables and the head are as they were quantized, and do not learn.

    With `recompute`, what is inside a block is computed again for its gradients, not kept.
    """

    def __init__(
        self,
        spec: ModelSpec,
        outer: Weights,
        blocks: Sequence[LearningBlock],
        rounding: Rounding,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.outer = {name: densify(weight).clone() for name, weight in outer.items()}
        head = outer[spec.head.weight.name]
        self.rounds_head = isinstance(head, QuantizedWeight) and head.scheme.activation_bits == 8
        self.blocks = nn.ModuleList(blocks)
        self.rounding = rounding
        self.recompute = recompute

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits, [B, T, V]."""
        tables = RotaryTables(self.spec, ids_BT.shape[1])
        hidden_BTH = embed(self.spec.embedding, self.outer, ids_BT)
        for module, block in zip(self.blocks, self.spec.blocks, strict=True):
            turn = tables.turn(block, 0, ids_BT.shape[1])
            if self.recompute and torch.is_grad_enabled():
                hidden_BTH = checkpoint(module, hidden_BTH, turn, use_reentrant=False)
            else:
                hidden_BTH = module(hidden_BTH, turn)
        return head_logits(self.spec, self.outer, hidden_BTH, apply=self._head(self.outer))

    def _head(self, weights: Mapping[str, Tensor]) -> Apply:
        def apply(linear: Linear, x: Tensor) -> Tensor:
            x = straight_through(x, self.rounding(x)) if self.rounds_head else x
            bias = weights[f"{linear.name}.bias"] if linear.bias else None
            return nn.functional.linear(x, weights[linear.weight.name], bias)

        return apply


class Teacher:
    """The float model, which does not learn. What leaves its last block is kept for windows that come again."""

    def __init__(self, engine: TorchEngine, kept_bytes: int = 2**30) -> None:
        self.engine = engine
        self.left_bytes = kept_bytes
        self.kept: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits, [B, T, V]."""
        # One window at a time: products of other shapes round differently, and a window is to have the same logits
        # whatever comes with it.
        return torch.cat([self.engine.head(self._hidden(ids_T[None])) for ids_T in ids_BT])

    def _hidden(self, ids_1T: Tensor) -> Tensor:
        key = ids_1T.numpy().tobytes()
        if key in self.kept:
            return self.kept[key]
        hidden_1TH = self.engine.hidden(ids_1T, RotaryTables(self.engine.spec, ids_1T.shape[1]))
        if hidden_1TH.nbytes <= self.left_bytes:
            self.left_bytes -= hidden_1TH.nbytes
            self.kept[key] = hidden_1TH
        return hidden_1TH


class Distillation(nn.Module):
    """A student's loss on some windows, as the training loop asks for it."""

    def __init__(self, student: Student, teacher: Teacher, cross_entropy: float) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.cross_entropy = cross_entropy

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Nats a token."""
        targets_BT = torch.full_like(ids_BT, NO_TARGET)
        targets_BT[:, :-1] = ids_BT[:, 1:]
        with torch.autocast("cpu", enabled=False):
            teacher_BTV = self.teacher.logits(ids_BT)
        student_NV = self.student(ids_BT).flatten(0, 1)
        return distillation_loss(student_NV, teacher_BTV.flatten(0, 1), targets_BT.flatten(), self.cross_entropy)
