"""Let people choose between pictures without knowing which model drew which, and keep what they said.

votes = Votes("votes.sqlite")          tasks and votes, in one file
serve(votes)                           a page for raters, on this machine
votes.table()                          one row a vote
agreement_of(votes.table())            do the raters agree
"""

from diffalign.labelling.agreement import agreement_of, cohen_kappa, krippendorff_alpha
from diffalign.labelling.store import Task, Votes

__all__ = ["Task", "Votes", "agreement_of", "cohen_kappa", "krippendorff_alpha"]
