"""What a captioner is asked, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from diffalign.data.fingerprints import digest_bytes
from diffalign.data.pairs import ImageRef

LEVELS = {"weak": 40, "medium": 60, "strong": 80}  # of a perturbation: DIPPER's lexical diversity in percent
INSTRUCTION = (
    "This picture was drawn for a prompt. Describe in one sentence of at most 40 words what the picture shows, worded "
    "like the prompt where the two agree. Say only what can be seen, also where the prompt asks for something else. "
    "Answer with the sentence alone.\nPrompt: {prompt}"
)  # our own wording: that of DCPO's captioners is not known
PROMPT = "{prompt}"  # what stands for the text in a template


@dataclass(frozen=True, eq=False)
class Question:
    """Ask about a picture, given a prompt; or, without a picture, about a text."""

    text: str
    image: ImageRef | None = None

    @cached_property
    def key(self) -> bytes:
        """Return a hash of the content: the same picture and text in two rows are one question."""
        return digest_bytes(
            self.text.encode(errors="surrogatepass") + b"\0" + (self.image.digest if self.image else b"")
        )


@dataclass(frozen=True)
class Missing:
    """Stand in the place of an answer that there is none."""

    reason: str


Answered = list[tuple[Question, str | Missing]]


class Captioner(ABC):
    """Answer questions."""

    asked: str  # what the answers depend on besides the question: weights, wording, settings
    reads_prompt: bool = True  # the answer depends on the text of the question

    @abstractmethod
    def answers(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Yield the questions with their answers, in any order, as many at a time as should be kept together."""


def tidy(answer: str) -> str | Missing:
    """Return an answer on one line; an empty one is missing.

    Example:
        >>> tidy(" a red\\n circle "), tidy(" ")
        ('a red circle', Missing(reason='empty answer'))
    """
    text = " ".join(answer.encode(errors="replace").decode().split())
    return text or Missing("empty answer")
