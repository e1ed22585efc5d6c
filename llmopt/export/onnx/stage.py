"""A stage of a plan as a graph of its own, with the words that ONNX has for plans.

Since IR version 11 a model may name the devices that it is for (`configuration`), and each node the stage of a pipeline
that it belongs to (`device_configurations`); see `DeviceConfigurationProto` in onnx.proto. onnxruntime opens such
graphs, and computes them where it is told to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, NodeProto

from llmopt.engine.ort_stages import stage_file
from llmopt.export.onnx.graph import Graph
from llmopt.export.onnx.kernels import Choose

CONFIGURATION = "llmopt.plan"
IR_VERSION = 11  # the first that has such words


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Stage `number` of a pipeline over `devices`, one each."""

    number: int
    devices: tuple[str, ...]

    @property
    def first(self) -> bool:
        """Whether it embeds."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it gives logits."""
        return self.number == len(self.devices) - 1

    @property
    def file(self) -> str:
        """Of its graph."""
        return stage_file(self.number)

    def graph(self, folder: Path, choose: Choose) -> Graph:
        """An empty one."""
        return Graph(folder, choose, file=self.file, ir_version=IR_VERSION)

    def annotate(self, model: ModelProto) -> None:
        """Say in the graph which of the devices it is for, node by node."""
        plan = model.configuration.add(name=CONFIGURATION, num_devices=len(self.devices))
        plan.device.extend(self.devices)
        for node in _every_node(model.graph.node):
            node.device_configurations.add(configuration_id=CONFIGURATION, pipeline_stage=self.number)


def _every_node(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    """Those inside branches, too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _every_node(attribute.g.node)
