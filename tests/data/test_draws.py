import subprocess
import sys

import numpy as np

from megatron_encdec.data.draws import draws, hash64, uniforms


def test_a_function_of_its_arguments_alone():
    first = draws(1, "mask", 5, 10)
    draws(2, "mask", 5, 10)
    np.testing.assert_array_equal(draws(1, "mask", 5, 10), first)
    for other in [(2, "mask", 5), (1, "length", 5), (1, "mask", 6)]:
        assert not (draws(*other, 10) == first).any()


def test_a_short_draw_is_a_prefix_of_a_long_one():
    np.testing.assert_array_equal(draws(1, "mask", 5, 7), draws(1, "mask", 5, 100)[:7])


def test_known_values_so_that_old_runs_stay_reproducible():
    assert hash64(1234, "mask") == 16027858910772054346
    expected = [9949997891085796000, 5483076377282822876, 6690869298202080178]
    assert draws(1234, "mask", 0, 3).tolist() == expected


def test_hash_is_the_same_in_another_process():
    code = "from megatron_encdec.data.draws import hash64; print(hash64(7, 'a', 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == hash64(7, "a", 3)


def test_uniforms_are_uniform_within_and_across_indices():
    many = np.stack([uniforms(3, "mask", i, 64) for i in range(1500)])
    assert 0 <= many.min() and many.max() < 1
    for values in (many.ravel(), many[:, 0], many[:, -1]):
        counts = np.bincount((values * 16).astype(int), minlength=16)
        chi_square = ((counts - values.size / 16) ** 2 / (values.size / 16)).sum()
        assert chi_square < 44.3  # 15 degrees of freedom, p = 1e-4
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 4 / 1500**0.5
