"""Train the demo model: `python -m llmopt.train.demo -o FOLDER`.

One seed, one machine and one number of threads give the same weights again; another machine gives the same quality. A
run that was stopped goes on, to the same weights.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt.artifact import Journal, Resume, journal
from llmopt.demo import Document, documents, oracle_perplexity
from llmopt.demo import tokenizer as demo_tokenizer
from llmopt.demo.grammar import END
from llmopt.progress import Progress, Silent
from llmopt.train.checkpoint import Checkpoints
from llmopt.train.loop import Trainer
from llmopt.train.muon import Muon
from llmopt.train.settings import Precision
from llmopt.train.settings import Settings as LoopSettings
from llmopt.train.state import Outcome

CONTEXT_LENGTH = 1024
TOKENS_PER_DOCUMENT = 100  # a little less than there are on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long and how fast to learn. A step sees `tokens_per_step` tokens in windows of `window`.

    Stories are shorter than `window`, so most steps can use short ones, which are cheaper; the last `long_share` of
    the steps use the whole context, from which the model learns to leave far away tokens alone.
    """

    seed: int = 0
    steps: int = 2800
    tokens_per_step: int = 2048
    window: int = 256
    long_share: float = 0.12
    peak_rate: float = 5e-3
    warmup_steps: int = 60
    tokenizer_documents: int = 4000
    evaluation_documents: int = 400
    precision: Precision = Precision.FP32

    @property
    def loop(self) -> LoopSettings:
        """As the training loop has it: a linear rise, then a cosine down to zero."""
        return LoopSettings(steps=self.steps, warmup_steps=self.warmup_steps, precision=self.precision)

    def window_at(self, step: int) -> int:
        """Tokens per window."""
        return self.window if step < self.steps * (1.0 - self.long_share) else CONTEXT_LENGTH


class NextToken(nn.Module):
    """A causal model of transformers as the loop has it: from token ids to their mean loss."""

    def __init__(self, causal: LlamaForCausalLM) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Nats a token."""
        loss: Tensor = self.causal(input_ids=ids_BT, labels=ids_BT).loss
        return loss


def train(settings: Settings, folder: Path, progress: Progress | None = None) -> dict[str, object]:
    """Write tokenizer, weights (float16) and `training.json` into `folder`, and return what the last one holds.

    Until that is done, checkpoints lie in a journal beside the folder.
    """
    progress = progress or Silent()
    told = json.dumps([dataclasses.asdict(settings), torch.__version__, torch.get_num_threads()])
    with journal(folder, hashlib.sha256(told.encode()).hexdigest(), Resume.IF_SAME, progress) as kept:
        return _train(settings, folder, kept, progress)


def _train(settings: Settings, folder: Path, kept: Journal, progress: Progress) -> dict[str, object]:
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    stories = documents("train", settings.tokenizer_documents, settings.seed)
    tokenizer = demo_tokenizer.learn(story.text for story in stories)
    demo_tokenizer.save(tokenizer, folder)
    model = new_model(tokenizer)
    outcome = _fit(model, tokenizer, settings, kept, progress)
    torch.nn.Module.half(model)  # transformers' own `half` is untyped
    model.save_pretrained(folder)
    # Judged as it is shipped: the weights rounded to float16, the arithmetic in float32.
    held_out = documents("evaluation", settings.evaluation_documents, settings.seed)
    perplexity, token_count = evaluate(torch.nn.Module.float(model), tokenizer, held_out)
    record: dict[str, object] = {
        "seed": settings.seed,
        "steps": settings.steps,
        "tokens": settings.steps * settings.tokens_per_step,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "minutes": round(outcome.seconds / 60, 1),
        "tokens_per_second": round(outcome.tokens_per_second),
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "evaluation_tokens": token_count,
        "perplexity": perplexity,
        "oracle_perplexity": oracle_perplexity(held_out, token_count),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "machine": platform.machine(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def new_model(tokenizer: tokenizers.Tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights. Sizes are multiples of 64 and 128, so that every group size divides them."""
    end = tokenizer.encode(END).ids[0]
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config)


def _fit(
    model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, settings: Settings, kept: Journal, progress: Progress
) -> Outcome:
    inner = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 1 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=settings.peak_rate, betas=(0.9, 0.95), weight_decay=0.0)
    stream_T, starts = _stream(tokenizer, settings)

    def batches(first: int) -> Iterator[list[Tensor]]:
        return ([ids_BT] for ids_BT in islice(_batches(stream_T, starts, settings), first, None))

    trainer = Trainer(
        NextToken(model),
        [adam, Muon(inner, settings.peak_rate)],
        batches,
        settings.loop,
        checkpoints=Checkpoints(kept),
        progress=progress,
    )
    return trainer.run("training the demo model")


def _batches(stream_T: np.ndarray, starts: np.ndarray, settings: Settings) -> Iterator[Tensor]:
    """Shape [windows, tokens], for each step. Windows begin with a story or the line feed before it.

    A window that began in the middle of one would ask for names and numbers that were told before it.
    """
    generator = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        window = settings.window_at(step)
        count = max(1, settings.tokens_per_step // window)
        usable = starts[1:][starts[1:] < len(stream_T) - window]
        begins = generator.choice(usable, size=count) - generator.integers(0, 2, size=count)
        yield torch.from_numpy(np.stack([stream_T[begin : begin + window] for begin in begins]))


def _stream(tokenizer: tokenizers.Tokenizer, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """As many tokens as training sees, in one row, and where stories begin in it."""
    wanted = settings.steps * settings.tokens_per_step
    stories = documents("train", wanted // TOKENS_PER_DOCUMENT + 1, settings.seed)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([story.text for story in stories])]
    starts = np.cumsum([0] + [len(ids) for ids in encoded[:-1]])
    return np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]), starts


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, stories: Sequence[Document], batch: int = 16
) -> tuple[float, int]:
    """Perplexity per token of whole stories, each behind the line feed that ends another; and their tokens' number."""
    nats, count = 0.0, 0
    for first in range(0, len(stories), batch):
        encoded = [tokenizer.encode(END + story.text).ids for story in stories[first : first + batch]]
        longest = max(map(len, encoded))
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded])
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
        for losses_T, ids in zip(losses_BT, encoded, strict=True):
            nats += losses_T[: len(ids) - 1].double().sum().item()
            count += len(ids) - 1
    return math.exp(nats / count), count


class _Lines(Silent):
    """Progress as lines on standard error, one now and then."""

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds
        self.told = self.began = time.monotonic()
        self.percent = 0.0

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Some more of it is done."""
        self.percent += steps
        now = time.monotonic()
        if note is not None and now - self.told >= self.seconds and self.percent > 0:
            left = (now - self.began) * (100 - self.percent) / self.percent
            self.say(f"{note}, {self.percent:.0f} %, {left:.0f} s left")
            self.told = now

    def say(self, message: str) -> None:
        """A line."""
        sys.stderr.write(f"{message}\n")

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator["_Lines"]:
        """One after the other."""
        yield self


def main() -> None:
    """Read the command line, train, and print what came out."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m llmopt.train.demo", description="Train the demo model.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", type=Precision, default=defaults.precision, choices=list(Precision))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(mode=True)
    settings = Settings(seed=arguments.seed, steps=arguments.steps, precision=arguments.precision)
    sys.stdout.write(json.dumps(train(settings, arguments.output, _Lines()), indent=2) + "\n")


if __name__ == "__main__":
    main()
