"""README.md of a folder of stages: what is in it, and a program that runs it without llmopt."""

from collections.abc import Sequence

from llmopt.engine.ort_stages import StageFile

_CARD = """\
# {model} in {count} stages

Each stage of a pipeline is an ONNX graph of its own: the first reads token ids and the others hidden states, each has
the cache of its own blocks, and the last gives logits. `stages.json` says which comes when.

| graph | device | blocks | reads | gives |
| --- | --- | --- | --- | --- |
{rows}

All on one machine, `llmopt generate .` runs them, and so does this:

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime

stages = json.loads(Path("stages.json").read_text())["stages"]
sessions = [onnxruntime.InferenceSession(stage["file"]) for stage in stages]
pasts = [[node for node in one.get_inputs() if node.name.startswith("past_key_values.")] for one in sessions]
caches = [
    {{node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32) for node in nodes}} for nodes in pasts
]
ids, tokens = {prompt}, []
for _ in range({count_tokens}):
    values = np.array([ids])
    for number, (stage, session) in enumerate(zip(stages, sessions)):
        seen = next(iter(caches[number].values())).shape[2]
        feed = {{stage["reads"]: values, "attention_mask": np.ones((1, seen + len(ids)), np.int64), **caches[number]}}
        presents = [name.replace("past_key_values", "present") for name in caches[number]]
        values, *longer = session.run([stage["gives"], *presents], feed)
        caches[number] = dict(zip(caches[number], longer))
    ids = [int(values[0, -1].argmax())]
    tokens += ids
print(tokens)
```

On several machines, each opens its own stage, and what that gives goes to the next. The graphs say it too, in ONNX's
own words: `configuration` names the devices, and each node its `pipeline_stage`.
"""


def stages_card(model: str, stages: Sequence[StageFile]) -> str:
    """The card."""
    rows = "\n".join(
        f"| {one.file} | {one.device} | {one.layers[0]} to {one.layers[1] - 1} | {one.reads} | {one.gives} |"
        for one in stages
    )
    return _CARD.format(model=model, count=len(stages), rows=rows, prompt="[1, 2, 3]", count_tokens=8)
