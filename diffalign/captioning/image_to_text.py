"""Captions by an image-to-text model through transformers: BLIP, LLaVA, Qwen-VL and their kin, greedily, in batches."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from diffalign.captioning.base import INSTRUCTION, PROMPT, Answered, Captioner, Question, tidy
from diffalign.errors import ModelError

WORDLESS = ("vision-encoder-decoder",)  # kinds of models that read a picture and no text


class ImageToText(Captioner):
    """Ask a model of `AutoModelForImageTextToText`. It is loaded at the first question.

    A model with a chat template (LLaVA, Qwen-VL) is asked `template`, by default `INSTRUCTION`, which shows it the
    prompt. Others (BLIP, GIT) go on where `template` ends, by default from nothing; what they add is the caption.

    Args:
        path_or_id: folder or hub id; weights are read from safetensors, code of the repository is not run.
        device: where it runs.
        dtype: of the weights.
        weights: what identifies the weights.
        template: what it is asked; {prompt} stands for the prompt. None: the default of its kind.
        new_tokens: the longest caption.
        batch_size: pictures at a time.
    """

    def __init__(
        self,
        path_or_id: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        weights: str,
        template: str | None = None,
        new_tokens: int = 64,
        batch_size: int = 8,
    ):
        self.path_or_id, self.device, self.dtype = path_or_id, device, dtype
        self.new_tokens, self.batch_size = new_tokens, batch_size
        self.is_wordless = self._config.model_type in WORDLESS
        if template and self.is_wordless:
            raise ModelError(f'"{path_or_id}" ({self._config.model_type}) reads no text: leave out --template.')
        self.is_chat = getattr(self._processor, "chat_template", None) is not None
        self.template = (INSTRUCTION if self.is_chat else "") if template is None else template
        self.reads_prompt = PROMPT in self.template
        self.asked = f"{weights}|{self.template}|{new_tokens}"

    def answers(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Yield a batch at a time."""
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            try:
                texts = self._write([q.image.load() for q in batch], [q.text for q in batch])
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{self.path_or_id} does not fit into memory with {len(batch)} pictures at a time. Give a smaller "
                    "--batch-size (what was captioned is kept), or --dtype bfloat16."
                ) from error
            yield [(question, tidy(text)) for question, text in zip(batch, texts, strict=True)]

    def _write(self, images: list[Image.Image], prompts: list[str]) -> list[str]:
        """Return what the model says of each picture."""
        asked = [self._chat(self.template.replace(PROMPT, prompt)) for prompt in prompts]
        if self.is_chat:
            return self._generate(images, asked)
        # Beginnings of captions cannot be padded (BLIP sets the first token itself): equally long ones go together.
        texts, lengths = [""] * len(images), [len(self._tokenizer(text).input_ids) for text in asked]
        for length in set(lengths):
            rows = [row for row, found in enumerate(lengths) if found == length]
            said = self._generate([images[row] for row in rows], [asked[row] for row in rows])
            for row, text in zip(rows, said, strict=True):
                texts[row] = text
        return texts

    def _chat(self, text: str) -> str:
        if not self.is_chat:
            return text
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    @torch.no_grad()
    def _generate(self, images: list[Image.Image], texts: list[str]) -> list[str]:
        given: dict[str, Any] = {"images": images, "return_tensors": "pt"}
        if self.is_chat:
            given |= {"images": [[image] for image in images], "text": texts, "padding": True}
            bos = self._tokenizer.bos_token
            given["add_special_tokens"] = not (bos and texts[0].startswith(bos))  # a template writes its own
        elif texts[0]:
            given["text"] = texts
        inputs = self._processor(**given).to(self.device, self.dtype)
        written = self._model.generate(**inputs, do_sample=False, max_new_tokens=self.new_tokens)
        return self._continuations(inputs.get("input_ids"), written)

    def _continuations(self, read: torch.Tensor | None, written: torch.Tensor) -> list[str]:
        """Decode what was generated, without the question where the model repeats it."""
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        if read is None:
            return texts
        length = read.shape[1]
        if written.shape[1] >= length and torch.equal(written[:, :length], read):
            return self._tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        before = self._tokenizer.batch_decode(read, skip_special_tokens=True)
        return [text.removeprefix(question) for text, question in zip(texts, before, strict=True)]

    # -- loading -----------------------------------------------------------------------------------------------------

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return self._load(AutoConfig)

    @property
    def _tokenizer(self) -> Any:
        return self._processor.tokenizer

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

        if self.is_wordless:  # written as two things, which no class of processors holds
            return _Wordless(self._load(AutoImageProcessor), self._load(AutoTokenizer))
        processor = self._load(AutoProcessor)
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ModelError(
                f'"{self.path_or_id}" ({self._config.model_type}) is no image-to-text model: its processor '
                f"{type(processor).__name__} does not read pictures and write text. Name one such as "
                "Salesforce/blip-image-captioning-large."
            )
        processor.tokenizer.padding_side = "left"  # what is generated follows the question
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForImageTextToText

        model = self._load(AutoModelForImageTextToText, dtype=self.dtype, use_safetensors=True)
        # a checkpoint's own sampling settings would only cause warnings: captions are greedy
        model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = self._tokenizer.pad_token_id
        return model.to(self.device).eval()

    def _load(self, kind: type, **settings: Any) -> Any:
        try:
            return kind.from_pretrained(self.path_or_id, **settings)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f'Cannot load the captioner "{self.path_or_id}" ({str(error).partition(chr(10))[0][:300]}). Give '
                "--with model=FOLDER or hub id of an image-to-text model with its processor and safetensors, e.g. "
                "blip=Salesforce/blip-image-captioning-large, or the address of a server."
            ) from error


class _Wordless:
    """Hold what prepares pictures and what spells out tokens, as a processor does."""

    chat_template = None

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, images: list[Image.Image], return_tensors: str) -> Any:
        return self.image_processor(images, return_tensors=return_tensors)
