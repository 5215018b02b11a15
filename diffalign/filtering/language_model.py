"""Rate prompts with a local language model through transformers, greedily and in batches."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import ModelError
from diffalign.filtering.files import weights_identity
from diffalign.filtering.text_quality import FALLBACK, HARMFUL, UNPARSED, Rating

# Our own wording: the paper's is not known.
INSTRUCTION = (
    "Rate the following prompt for a text-to-image model from 0 to 10. Judge how clear and concrete it is and how much "
    "there is to see in the picture it asks for: 1 is unclear or not about a picture, 10 is clear, concrete and rich. "
    "Give 0 to any prompt that asks for something harmful: sexual content, gore, hate, or a real person in a false or "
    "degrading light. Answer with the integer alone.\n\nPrompt: {prompt}\nRating:"
)
NEW_TOKENS = 12  # an integer, or enough of a sentence to tell that it declines
_INTEGER = re.compile(r"\s*(\d+)")
_DECLINED = re.compile(
    r"\s*(harmful\b|((i'?m|i am) )?(very )?sorry\b|i (cannot|can't|can\u2019t|won't)\b|i( am|'m) (unable|not able)\b)",
    re.IGNORECASE,
)


def parse_answer(answer: str, fallback: float = FALLBACK) -> Rating:
    """Read an answer: an integer, cut to 0..10; 0 or a refusal to answer is harmful; anything else is unparsed.

    Example:
        >>> parse_answer(" 7/10").score, parse_answer("0").flag, parse_answer("seven").flag
        (7.0, 'harmful', 'unparsed')
    """
    if found := _INTEGER.match(answer):
        score = min(float(found[1]), 10.0)
        return Rating(score, HARMFUL if score == 0 else "", answer)
    if _DECLINED.match(answer):
        return Rating(0.0, HARMFUL, answer)
    return Rating(fallback, UNPARSED, answer)


class LanguageModelRater:
    """Ask a causal language model for a rating of each prompt. Loaded at the first call.

    Args:
        path_or_id: folder or hub id of a causal language model; a chat template is used where its tokenizer has one.
        device: where it runs.
        dtype: of the weights.
        instruction: what is asked; {prompt} stands for the prompt.
        fallback: the rating of answers that hold no integer.
    """

    def __init__(
        self,
        path_or_id: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        instruction: str = INSTRUCTION,
        fallback: float = FALLBACK,
    ):
        self.path_or_id, self.device, self.dtype = path_or_id, device, dtype
        self.instruction, self.fallback = instruction, fallback

    def asked(self, memo: Path | None = None) -> str:
        """Return what the ratings depend on: weights, instruction and fallback. The key of a cache."""
        return f"{weights_identity(self.path_or_id, memo)}|{self.instruction}|{self.fallback}"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Rating]:
        """Return a rating for each prompt."""
        tokenizer, model = self._loaded
        texts = [self._text(prompt) for prompt in prompts]
        special = getattr(tokenizer, "chat_template", None) is None  # a template writes its own special tokens
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special).to(self.device)
        inputs.pop("token_type_ids", None)
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id}
        answers = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [parse_answer(answer, self.fallback) for answer in decoded]

    def _text(self, prompt: str) -> str:
        question = self.instruction.replace("{prompt}", prompt)
        tokenizer, _ = self._loaded
        if getattr(tokenizer, "chat_template", None) is None:
            return question
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path_or_id, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(self.path_or_id, dtype=self.dtype, use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f'Cannot load the language model "{self.path_or_id}" ({error}). Give --text-quality-model the folder '
                "or hub id of a causal language model with its tokenizer, or ratings in a file with --text-quality."
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # a checkpoint's own sampling settings would only cause warnings: answers are greedy
        model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        return tokenizer, model.to(self.device).eval()
