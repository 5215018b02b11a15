"""Let people choose between pictures without knowing which model drew which, and keep what they said.

votes = Votes("votes.sqlite")          tasks and votes, in one file
serve(votes)                           a page for raters, on this machine
votes.table()                          one row a vote
Rankings("votes.sqlite")               the same for k pictures to rank
agreement_of(votes.table())            do the raters agree
"""

from diffalign.labelling.agreement import agreement_of, cohen_kappa, krippendorff_alpha
from diffalign.labelling.rankings import PictureList, Rankings, read_votes
from diffalign.labelling.store import Task, Votes

__all__ = [
    "PictureList",
    "Rankings",
    "Task",
    "Votes",
    "agreement_of",
    "cohen_kappa",
    "krippendorff_alpha",
    "read_votes",
]
