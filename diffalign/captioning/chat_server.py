"""Captions and paraphrases by a server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, Ollama ..."""

import base64
import io
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from diffalign.captioning.base import INSTRUCTION, PROMPT, Answered, Captioner, Missing, Question, tidy
from diffalign.captioning.http_answers import Endpoint, PassingError, RefusedError
from diffalign.errors import ModelError

LONGEST_SIDE = 1024  # pixels of a picture that is sent
GIVE_UP = 20  # failures in a row: the server is down, or cannot do what is asked
# Our own wording, for want of DIPPER.
PARAPHRASES = {
    "weak": "Rewrite this caption of a picture so that it says nearly the same in other words; a detail may be lost. ",
    "medium": "Rewrite this caption of a picture in other words, changing or losing about half of its details. ",
    "strong": "Rewrite this caption of a picture so freely that little but its subject remains. ",
}


def paraphrase(level: str) -> str:
    """Return the template that asks for a perturbed text."""
    return f"{PARAPHRASES[level]}Answer with the new caption alone.\nCaption: {PROMPT}"


class ChatServer(Captioner):
    """Ask a server, several questions at a time, at temperature 0.

    Args:
        endpoint: where it is.
        model: as the server calls it; None: the only one it has.
        template: what it is asked; {prompt} stands for the text of the question.
        new_tokens: the longest answer.
        concurrency: requests at a time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str | None = None,
        template: str | None = None,
        new_tokens: int = 64,
        concurrency: int = 8,
    ):
        self.endpoint, self.new_tokens, self.concurrency = endpoint, new_tokens, concurrency
        self._is_there = False
        self.model = model or self._only_model()
        self.template = INSTRUCTION if template is None else template
        self.reads_prompt = PROMPT in self.template
        self.asked = f"server|{self.model}|{self.template}|{new_tokens}"

    def answers(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Yield every answer as it comes; threads that wait for one end with the process at the latest."""
        self._models()
        # No thread asks on while answers wait to be kept: a kill loses few.
        todo, done, stop = queue.SimpleQueue(), queue.Queue(self.concurrency), threading.Event()
        for question in questions:
            todo.put(question)
        for _ in range(min(self.concurrency, len(questions))):
            threading.Thread(target=self._work, args=(todo, done, stop), daemon=True).start()
        failed = 0
        try:
            for _ in questions:
                question, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                failed = failed + 1 if isinstance(answer, Missing) else 0
                if failed == GIVE_UP:
                    raise ModelError(
                        f"{self.endpoint.address} failed {failed} times in a row, at last with: {answer.reason}. What "
                        "was answered is kept: run the same command when the server can answer."
                    )
                yield [(question, answer)]
        finally:
            stop.set()
            with suppress(queue.Empty):  # let go of those that wait to hand over an answer
                while True:
                    done.get_nowait()

    def _work(self, todo: queue.SimpleQueue, done: queue.Queue, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                question = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((question, self._answer(question)))
            except BaseException as error:  # is raised where somebody sees it
                stop.set()
                done.put((question, error))

    def _answer(self, question: Question) -> str | Missing:
        try:
            return tidy(self.endpoint.send("chat/completions", self._body(question), _content))
        except (PassingError, RefusedError) as error:
            return Missing(str(error))

    def _body(self, question: Question) -> dict[str, Any]:
        text = {"type": "text", "text": self.template.replace(PROMPT, question.text)}
        pictures = [] if question.image is None else [_part(question.image.load())]
        messages = [{"role": "user", "content": [*pictures, text]}]
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.new_tokens}

    # -- what the server has -----------------------------------------------------------------------------------------

    def _models(self) -> list[str]:
        """Return the names of the server's models, none if it does not tell; raise ModelError where nobody answers."""
        if self._is_there:
            return []
        names: list[str] = []
        try:
            names = self.endpoint.once("models", None, lambda answer: [str(model["id"]) for model in answer["data"]])
        except PassingError as error:
            if not error.is_there:
                raise ModelError(
                    f"No server answers at {self.endpoint.address} ({error}). Start it, e.g. `vllm serve "
                    "llava-hf/llava-v1.6-34b-hf`, or correct the address: it usually ends in /v1."
                ) from error
        except RefusedError:
            pass
        self._is_there = True
        return names

    def _only_model(self) -> str:
        names = self._models()
        if len(names) == 1:
            return names[0]
        has = f"has {', '.join(names)}" if names else "does not tell what it has"
        raise ModelError(f"{self.endpoint.address} {has}: say with --model which is to be asked.")


def _content(answer: Any) -> str:
    """Return the text of an answer; raise what `Endpoint` takes for an answer that cannot be read."""
    content = answer["choices"][0]["message"]["content"]
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TypeError(f"the content is {type(content).__name__}")
    return content


def _part(image: Image.Image) -> dict[str, Any]:
    """Return a picture as part of a message."""
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
