"""Ratings of prompts from files and functions, and the cache that spares asking twice."""

import json

import pandas as pd
import pytest

from diffalign.errors import DataError
from diffalign.filtering import Rating, rate, read_qualities

PROMPTS = ["a cat", "a dog on the moon", "a cat"]


class Counter:
    """Rate by length and remember what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked += prompts
        return [float(len(prompt) % 11) for prompt in prompts]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_file_rates_prompts(tmp_path, suffix):
    table = pd.DataFrame({"prompt": ["a cat", "b"], "score": [7, 0], "harmful": [False, True]})
    path = tmp_path / f"ratings{suffix}"
    if suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        getattr(table, f"to_{suffix[1:]}")(path, index=False)
    found = read_qualities(path, [*PROMPTS, "b"])
    assert found == {"a cat": Rating(7.0), "a dog on the moon": Rating(5.0, "missing"), "b": Rating(0.0, "harmful")}


def test_faults_of_a_file_are_named(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("prompt,score\na cat,good\n")
    with pytest.raises(DataError, match="row 0: the score is 'good', expected a number"):
        read_qualities(path, PROMPTS)
    path.write_text("prompt,score\na cat,1\na cat,2\n")
    with pytest.raises(DataError, match="rates 'a cat' both 1 and 2"):
        read_qualities(path, PROMPTS)
    path.write_text("prompt,score\nanother,1\n")
    with pytest.raises(DataError, match=r"rates none of the 2 prompts, e.g. not 'a cat'"):
        read_qualities(path, PROMPTS)
    path.write_text("prompt,rating\na cat,1\n")
    with pytest.raises(DataError, match=r'lacks the column.*"score"'):
        read_qualities(path, PROMPTS)


def test_a_function_is_asked_once_a_prompt_in_batches_of_like_length():
    counter, told = Counter(), []
    prompts = ["xxx", "x", "xx", "x", "xxxx"]
    found = rate(prompts, counter, batch_size=2, advance=told.append)
    assert counter.asked == ["x", "xx", "xxx", "xxxx"]
    assert list(found) == ["xxx", "x", "xx", "xxxx"]
    assert found["xxx"] == Rating(3.0)
    assert sum(told) == 4


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    cache = tmp_path / "ratings.jsonl"
    prompts = ["x" * n for n in range(1, 10)]
    stopping = Counter()

    def stops(batch):
        if len(stopping.asked) == 4:
            raise KeyboardInterrupt
        return stopping(batch)

    with pytest.raises(KeyboardInterrupt):
        rate(prompts, stops, cache=cache, asked="me", batch_size=2)
    with open(cache, "a") as file:
        file.write('{"asked": "me", "prompt": "xxx')  # killed in the middle of a line
    counter = Counter()
    found = rate(prompts, counter, cache=cache, asked="me", batch_size=2)
    assert counter.asked == prompts[4:]
    assert [found[prompt].score for prompt in prompts] == list(range(1, 10))
    again = Counter()
    assert rate(prompts, again, cache=cache, asked="me") == found
    assert again.asked == []
    other = Counter()
    rate(prompts[:1], other, cache=cache, asked="another question")
    assert other.asked == prompts[:1]


def test_flags_and_answers_survive_the_cache(tmp_path):
    rating = Rating(0.0, "harmful", "0: gore \u2028 \u00e4")
    rate(["p\nq"], lambda prompts: [rating], cache=tmp_path / "cache.jsonl", asked="me")
    assert rate(["p\nq"], Counter(), cache=tmp_path / "cache.jsonl", asked="me") == {"p\nq": rating}
    assert len((tmp_path / "cache.jsonl").read_bytes().splitlines()) == 1
    assert json.loads((tmp_path / "cache.jsonl").read_text())["flag"] == "harmful"


@pytest.mark.parametrize(
    ("answers", "message"), [([1.0], "1 ratings for 2 prompts"), ([1.0, float("nan")], "expected a finite number")]
)
def test_wrong_functions_are_named(answers, message):
    with pytest.raises(DataError, match=message):
        rate(["a", "b"], lambda prompts: answers)
