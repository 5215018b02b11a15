import math

import numpy as np
import pytest

from diffalign.data import ClassRatioSampler, CurriculumSampler
from diffalign.errors import DataError

DESIRABLE = np.array([i % 4 == 0 for i in range(40)])  # 10 of 40


class TestClassRatio:
    @pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.8, 1.0])
    def test_exact_after_any_number_of_draws(self, ratio):
        drawn = DESIRABLE[ClassRatioSampler(DESIRABLE, ratio, seed=0).indices(0, 300)]
        counts = np.cumsum(drawn)
        assert all(abs(count - (i + 1) * ratio) < 1 for i, count in enumerate(counts))

    def test_draw_i_is_desirable_where_the_floor_rises(self):
        drawn = DESIRABLE[ClassRatioSampler(DESIRABLE, 0.8, seed=0).indices(0, 50)]
        assert drawn.tolist() == [i % 5 != 0 for i in range(50)]  # 0.8 is four fifths: no drift by rounding
        far = DESIRABLE[ClassRatioSampler(DESIRABLE, 0.1, seed=0).indices(10**15, 20)]
        assert far.tolist() == [i % 10 == 9 for i in range(20)]

    def test_each_class_without_replacement_in_its_own_epochs(self):
        drawn = np.array(ClassRatioSampler(DESIRABLE, 0.8, seed=3).indices(0, 600))
        for wanted, size in ((True, 10), (False, 30)):
            members = np.flatnonzero(DESIRABLE == wanted)
            seen = drawn[DESIRABLE[drawn] == wanted]
            epochs = seen[: len(seen) // size * size].reshape(-1, size)
            assert len(epochs) >= 4
            assert all(sorted(epoch) == members.tolist() for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)

    def test_a_pure_function_of_position(self):
        whole = ClassRatioSampler(DESIRABLE, 0.35, seed=1).indices(0, 400)
        for position, count in [(0, 3), (390, 10), (7, 20), (133, 1), (99, 200), (5, 0)]:
            again = ClassRatioSampler(DESIRABLE, 0.35, seed=1)
            assert again.indices(position, count) == whole[position : position + count]

    def test_seeds_differ(self):
        assert len({tuple(ClassRatioSampler(DESIRABLE, 0.5, seed=s).indices(0, 40)) for s in range(5)}) == 5

    def test_pinned(self):
        assert ClassRatioSampler(DESIRABLE, 0.8, seed=42).indices(0, 10) == PINNED_RATIO

    def test_wrong_settings(self):
        with pytest.raises(DataError, match=r"positive_ratio must be in \[0, 1\], got 1.2"):
            ClassRatioSampler(DESIRABLE, 1.2, seed=0)
        with pytest.raises(DataError, match=r"None of the 3 images is desirable, but positive_ratio 0\.8 asks for 80%"):
            ClassRatioSampler([False] * 3, 0.8, seed=0)
        with pytest.raises(DataError, match=r"None of the 3 images is undesirable.*20%.*Set it to 1 or null"):
            ClassRatioSampler([True] * 3, 0.8, seed=0)
        assert sorted(ClassRatioSampler([True] * 3, 1.0, seed=0).indices(0, 3)) == [0, 1, 2]
        assert sorted(ClassRatioSampler([False] * 3, 0.0, seed=0).indices(0, 3)) == [0, 1, 2]


MARGINS = np.random.default_rng(0).normal(size=23)


class TestCurriculum:
    def test_a_stage_draws_from_its_easiest_pairs_only_and_from_all_of_them(self):
        sampler = CurriculumSampler(MARGINS, stages=4, steps_per_stage_examples=100, seed=0)
        easiest = np.argsort(-MARGINS)
        for stage in range(6):
            allowed = easiest[: math.ceil(23 * min(stage + 1, 4) / 4)]
            assert sorted({*sampler.indices(100 * stage, 100)}) == sorted(allowed)

    def test_epochs_within_a_stage(self):
        sampler = CurriculumSampler(MARGINS, stages=2, steps_per_stage_examples=36, seed=0)
        epochs = [tuple(sampler.indices(12 * i, 12)) for i in range(3)]
        assert [len({*epoch}) for epoch in epochs] == [12] * 3
        assert len({*epochs}) == 3
        last = [tuple(sampler.indices(36 + 23 * i, 23)) for i in range(3)]
        assert [len({*epoch}) for epoch in last] == [23] * 3

    def test_a_pure_function_of_position(self):
        whole = CurriculumSampler(MARGINS, 3, 50, seed=1).indices(0, 400)
        for position, count in [(0, 3), (49, 2), (48, 110), (390, 10), (100, 1), (120, 0)]:
            assert (
                CurriculumSampler(MARGINS, 3, 50, seed=1).indices(position, count) == whole[position : position + count]
            )

    def test_one_stage_has_all_and_seeds_differ(self):
        orders = [CurriculumSampler(MARGINS, 1, 5, seed=seed).indices(0, 23) for seed in range(4)]
        assert all(sorted(order) == list(range(23)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4

    def test_equal_margins_keep_the_order_of_the_data(self):
        assert {*CurriculumSampler([1.0] * 10, 2, 20, seed=0).indices(0, 20)} == set(range(5))

    def test_more_stages_than_pairs(self):
        sampler = CurriculumSampler([3.0, 1.0, 2.0], 5, 4, seed=0)
        assert [{*sampler.indices(4 * stage, 4)} for stage in range(5)] == [{0}, {0, 2}, {0, 2}, {0, 1, 2}, {0, 1, 2}]

    def test_pinned(self):
        assert CurriculumSampler(MARGINS, 4, 5, seed=42).indices(0, 12) == PINNED_CURRICULUM

    def test_wrong_settings(self):
        for settings, message in (
            ((0, 5), "stages must be at least 1, got 0"),
            ((2, 0), "examples must be at least 1"),
        ):
            with pytest.raises(DataError, match=message):
                CurriculumSampler(MARGINS, *settings, seed=0)
        with pytest.raises(DataError, match=r"2 of 3 pairs have no margin.*diffalign score DATA"):
            CurriculumSampler([1.0, float("nan"), float("nan")], 2, 5, seed=0)
        with pytest.raises(DataError, match="empty"):
            CurriculumSampler([], 2, 5, seed=0)


PINNED_RATIO = [29, 12, 24, 32, 0, 35, 16, 36, 20, 8]  # recorded from this implementation
PINNED_CURRICULUM = [18, 6, 19, 2, 7, 7, 19, 11, 21, 20, 7, 22]
