"""Say what pictures show, and perturb what was said: the data of DCPO.

base.py has what a captioner is asked and answers; image_to_text.py asks a model through transformers, chat_server.py a
server (paraphrases too); dipper.py and dropped_words.py perturb texts. answers.py keeps what was answered.
"""

from diffalign.captioning.answers import Answers, ask
from diffalign.captioning.base import LEVELS, Captioner, Missing, Question
from diffalign.captioning.chat_server import ChatServer
from diffalign.captioning.dipper import Dipper
from diffalign.captioning.dropped_words import DroppedWords
from diffalign.captioning.image_to_text import ImageToText

__all__ = [
    "LEVELS",
    "Answers",
    "Captioner",
    "ChatServer",
    "Dipper",
    "DroppedWords",
    "ImageToText",
    "Missing",
    "Question",
    "ask",
]
