"""DCPO's perturbation: DIPPER (Krishna et al. 2023), a T5 that rewrites a text as freely as it is told."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

from diffalign.captioning.base import LEVELS, Answered, Captioner, Question, tidy
from diffalign.data.fingerprints import stable_id
from diffalign.errors import ModelError

# All of DCPO's perturb_caption.py (sahsaeedi/DCPO-T2I @62335bb7): model, wording, and how it samples.
DIPPER, TOKENIZER = "kalpeshk2011/dipper-paraphraser-xxl", "google/t5-v1_1-xxl"
PREFIX = "Paraphrase and perturb the following image caption."
TOP_P, LENGTH, SENTENCES = 0.75, 256, 3
_END = re.compile(r"(?<=[.!?])\s+")  # the script means nltk's sent_tokenize, which it does not import


class Dipper(Captioner):
    """Paraphrase texts at a lexical diversity of 40 (weak), 60 or 80, keeping the order of words.

    Three sentences are rewritten at a time, each time with what was rewritten before as context. It samples as the
    authors do, but with noise keyed by the text, so that a text becomes the same in any batch.

    Args:
        level: one of `LEVELS`.
        path_or_id: folder or hub id of a DIPPER; one without a tokenizer takes that of T5 v1.1.
        device: where it runs.
        dtype: of the weights.
        weights: what identifies the weights.
        batch_size: texts at a time.
        seed: another one gives other paraphrases.
    """

    def __init__(
        self,
        level: str,
        path_or_id: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        weights: str,
        batch_size: int = 8,
        seed: int = 0,
    ):
        self.lexical = 100 - LEVELS[level]  # DIPPER is told how much stays
        self.path_or_id, self.device, self.dtype = path_or_id, device, dtype
        self.batch_size, self.seed = batch_size, seed
        self.asked = f"dipper|{weights}|{self.lexical}|{seed}"

    def answers(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Yield a batch at a time."""
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            rewritten = self._rewrite([question.text for question in batch])
            yield [(question, tidy(text)) for question, text in zip(batch, rewritten, strict=True)]

    def _rewrite(self, texts: list[str]) -> list[str]:
        windows = [_windows(text) for text in texts]
        done = [""] * len(texts)
        for number in range(max(len(parts) for parts in windows)):
            rows = [row for row, parts in enumerate(windows) if number < len(parts)]
            asked = [self._control(done[row], windows[row][number]) for row in rows]
            seeds = [stable_id(f"{self.seed}|{number}|{texts[row]}") for row in rows]
            for row, text in zip(rows, self._sample(asked, seeds), strict=True):
                done[row] = f"{done[row]} {text}".strip()
        return done

    def _control(self, before: str, window: str) -> str:
        context = f"{PREFIX} {before}".strip()
        return f"lexical = {self.lexical}, order = 100 {context} <sent> {window} </sent>"

    @torch.no_grad()
    def _sample(self, texts: list[str], seeds: list[int]) -> list[str]:
        tokenizer, model = self._loaded
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
        sampling = [KeyedSampling(seeds, TOP_P)]
        written = model.generate(**inputs, do_sample=False, num_beams=1, max_length=LENGTH, logits_processor=sampling)
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(self.path_or_id, dtype=self.dtype)
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.path_or_id)
            except (OSError, ValueError):
                tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f'Cannot load the paraphraser "{self.path_or_id}" ({str(error).partition(chr(10))[0][:300]}). Give '
                f"--perturb-with dipper=FOLDER or hub id of a DIPPER ({DIPPER} has 11 billion parameters), the "
                "address of a server, or words."
            ) from error
        model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        return tokenizer, model.to(self.device).eval()


class KeyedSampling(LogitsProcessor):
    """Turn greedy decoding into sampling from the nucleus, each row with noise of its own seed.

    The largest of logits plus Gumbel noise is a sample of their softmax; a row draws the same whatever the others are.
    """

    def __init__(self, seeds: Sequence[int], top_p: float):
        self.nucleus = TopPLogitsWarper(top_p)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [B, V] with noise; -inf outside the nucleus."""
        kept = self.nucleus(input_ids, scores.float())
        drawn = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(drawn.clamp(1e-300, 1 - 1e-16)))
        return kept + noise.float().to(scores.device)


def _windows(text: str) -> list[str]:
    sentences = _END.split(" ".join(text.split()))
    return [" ".join(sentences[at : at + SENTENCES]) for at in range(0, len(sentences), SENTENCES)]
