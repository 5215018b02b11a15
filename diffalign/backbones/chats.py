"""Prompts as language models are told them that encode text: turned into chats."""

from collections.abc import Sequence
from typing import Any


def chats(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Return each prompt as a user's message in the tokenizer's chat template, and the beginning of an answer."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for prompt in prompts
    ]
