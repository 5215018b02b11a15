"""The warning about a choice that does not sort out wrong labels: where it is due, and the knob it names."""

import numpy as np
import pandas as pd
import pytest

from diffalign.filtering import ImportanceSettings
from diffalign.filtering.agreement import Agreement, agreements

SIGNED, ABSOLUTE = ImportanceSettings(), ImportanceSettings(margin="absolute")


def pairs(differences):
    return pd.DataFrame({"score_chosen": differences, "score_rejected": np.zeros(len(differences))})


def test_agreement_of_all_and_of_the_kept():
    table = pairs([3.0, -2.0, 0.0, 1.0, np.nan])
    assert np.array_equal(agreements(table), [1, 0, 0.5, 1, np.nan], equal_nan=True)
    found = Agreement.of(table, np.array([0, 3, 4]))
    assert (found.before, found.after, found.kept) == (0.625, 1.0, 2)
    assert Agreement.of(table[["score_rejected"]], np.array([0])) is None
    assert Agreement.of(table, np.array([4])) is None


def test_the_signed_margin_is_the_default():
    assert ImportanceSettings().margin == "signed"


@pytest.mark.parametrize(
    ("before", "after", "kept", "verdict"),
    [
        (0.7, 0.9, 200, "better"),
        (0.7, 0.7 + 0.0640, 200, "better"),  # 1.96 * sqrt(0.7 * 0.3 / 200) = 0.0635
        (0.7, 0.7 + 0.0630, 200, "undecided"),
        (0.7, 0.7, 200, "undecided"),
        (1.0, 1.0, 200, "undecided"),
        (0.7, 0.699, 200, "worse"),
    ],
)
def test_verdicts_at_their_edges(before, after, kept, verdict):
    found = Agreement(before, after, kept)
    assert found.verdict == verdict
    assert (found.warning("fifa", SIGNED) is None) == (verdict != "worse")


@pytest.mark.parametrize(
    ("method", "settings", "knob"),
    [
        ("fifa", ABSOLUTE, "use --margin signed"),
        ("diverse", ABSOLUTE, "use --margin signed"),
        ("fifa", ImportanceSettings(alpha=2), "Lower --alpha (now 2)"),
        ("fifa", ImportanceSettings(alpha=0), "with --require-agreement"),
        ("quality-aware", ABSOLUTE, "with --require-agreement"),
        ("random", SIGNED, "this is chance"),
    ],
)
def test_a_warning_names_both_numbers_and_the_knob(method, settings, knob):
    said = Agreement(0.7, 0.612, 100).warning(method, settings)
    assert "61.2% of the labels kept, less than with all (70.0%)" in said
    assert knob in said


def test_a_margin_blind_to_labels_is_told_where_it_does_not_help():
    assert "hardly more than with all" in Agreement(0.652, 0.67, 218).warning("fifa", ABSOLUTE)
    assert Agreement(0.652, 0.67, 218).warning("fifa", SIGNED) is None
    assert Agreement(1.0, 1.0, 218).warning("fifa", ABSOLUTE) is None
    assert Agreement(0.652, 0.99, 218).warning("fifa", ABSOLUTE) is None
