"""What may be claimed, at the edges: clear only after correction, suggestive by the test alone or the interval."""

import pandas as pd
import pytest

from diffalign.evaluation import Bootstrap, Comparison, Evaluation, write_report
from diffalign.evaluation.statistics import binomial_test
from diffalign.evaluation.verdict import p_equals


def scores(wins, ties, losses, models=("dpo",), scorers=("s",), baseline="base"):
    """Return scores with which every model and scorer has these wins, ties and losses; later models none but ties."""
    moves = [1.0] * wins + [0.0] * ties + [-1.0] * losses
    rows = []
    for scorer in scorers:
        for model in (baseline, *models):
            moved = moves if model == models[0] and scorer == scorers[0] else [0.0] * len(moves)
            for prompt, move in enumerate(moved):
                score = 0.5 + (move if model != baseline else 0.0)
                rows.append((prompt, f"prompt {prompt}", 0, model, scorer, score))
    return pd.DataFrame(rows, columns=["prompt_id", "prompt", "seed", "model", "scorer", "score"])


def result_of(wins, ties, losses, **more):
    evaluation = Evaluation(scores=scores(wins, ties, losses, **more), baseline="base", bootstrap=Bootstrap())
    comparison = evaluation.comparisons["dpo"]
    return comparison.results["s"], comparison.describe("s"), comparison


# Of 40 prompts 27 have to be won (p = 0.038), with two tests 28 (0.033); 7 against 1 move the interval only.
@pytest.mark.parametrize(
    ("counts", "scorers", "verdict", "words"),
    [
        ((27, 0, 13), 1, "better", "s prefers dpo (p = 0.038)."),
        ((13, 0, 27), 1, "worse", "s prefers base (p = 0.038)."),
        ((27, 0, 13), 2, "suggests better", "p = 0.038 for this test alone), but p = 0.077 after Holm"),
        ((13, 0, 27), 2, "suggests worse", "Suggestive only: s leans to base (the interval lies below 50% and"),
        ((28, 0, 12), 2, "better", "s prefers dpo (p = 0.033 after Holm's adjustment for 2 tests)."),
        ((7, 32, 1), 1, "suggests better", "s leans to dpo (the interval lies above 50%), but p = 0.070 does not"),
        ((23, 0, 17), 1, "undecided", "No difference shown (p = 0.430): these prompts do not settle"),
        ((0, 40, 0), 1, "undecided", "No difference shown (p = 1.000)"),
        ((20, 0, 20), 3, "undecided", "No difference shown (p = 1.000 after Holm's adjustment for 3 tests)"),
        ((40, 0, 0), 3, "better", "s prefers dpo (p < 0.001 after"),
    ],
)
def test_the_corrected_test_decides(counts, scorers, verdict, words):
    result, said, _ = result_of(*counts, scorers=("s", "t", "u")[:scorers])
    assert result.p_value == binomial_test(counts[0], counts[0] + counts[2])
    assert result.verdict == verdict
    assert words in said
    assert ("prefers dpo" in said or "prefers base" in said) == (verdict in ("better", "worse"))
    assert ("Suggestive only" in said) == verdict.startswith("suggests")
    assert "rough" not in said


def test_other_models_count_as_tests_too():
    assert result_of(27, 0, 13)[0].verdict == "better"
    result, said, _ = result_of(27, 0, 13, models=("dpo", "mapo"))
    assert (result.tests, result.verdict) == (2, "suggests better")
    assert "Holm's adjustment for 2 tests" in said


def test_the_level_of_the_intervals_is_that_of_the_test():
    table = scores(27, 0, 13)
    base, aligned = table[table.model == "base"], table[table.model == "dpo"]
    strict = Comparison.from_tables(base, aligned, bootstrap=Bootstrap(level=0.99)).results["s"]
    assert strict.verdict == "undecided"
    assert Comparison.from_tables(base, aligned).results["s"].verdict == "better"


def test_two_prompts_are_never_a_clear_win():
    result, said, _ = result_of(2, 0, 0)
    assert result.verdict == "suggests better"
    assert "With only 2 prompts the interval itself is rough" in said


def test_page_files_and_console_word_it_alike(tmp_path):
    _, said, comparison = result_of(27, 0, 13, scorers=("s", "t"))
    page = write_report(tmp_path / "report.html", comparison).read_text()
    assert 'class="claim suggests better">Suggestive only: s leans to dpo<' in page
    assert said.replace("'", "&#39;") in page
    evaluation = Evaluation(scores=comparison.scores, baseline="base")
    assert evaluation.summary()["models"]["dpo"]["scorers"]["s"]["sentence"] == said
    assert evaluation.table.loc[0, "verdict"] == "suggests better"
    assert "| suggests better |" in evaluation.markdown()


def test_p_values_in_words():
    assert [p_equals(p) for p in (0.0009, 0.001, 0.2041, 1.0)] == ["p < 0.001", "p = 0.001", "p = 0.204", "p = 1.000"]
