"""A perturbation without a model: words are left out, chosen by a hash. Ours, not DCPO's; for lack of a paraphraser."""

from collections.abc import Iterator, Sequence

from diffalign.captioning.base import Answered, Captioner, Question
from diffalign.data.fingerprints import digest_bytes

SHARES = {"weak": 0.2, "medium": 0.4, "strong": 0.6}  # of the words that are left out


class DroppedWords(Captioner):
    """Leave out a share of a text's words, at least one and never all.

    Args:
        level: one of `SHARES`.
        seed: another one leaves out other words.
    """

    def __init__(self, level: str, seed: int = 0):
        self.share, self.seed = SHARES[level], seed
        self.asked = f"words|{self.share}|{seed}"

    def answers(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """Yield all at once."""
        yield [(question, self.perturb(question.text)) for question in questions]

    def perturb(self, text: str) -> str:
        """Return the text without some of its words.

        Example:
            >>> DroppedWords("weak").perturb("a small red circle on a blue background")
            'a red circle a blue background'
        """
        words = text.split()
        ordered = sorted(range(len(words)), key=lambda at: digest_bytes(f"{self.seed}|{at}|{text}".encode()))
        dropped = set(ordered[: min(max(1, round(self.share * len(words))), len(words) - 1)])
        return " ".join(word for at, word in enumerate(words) if at not in dropped)
