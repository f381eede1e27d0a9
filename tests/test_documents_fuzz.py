"""
Random documents, padding, shapes and settings against runs of one document each. A failure is a case in which streaming and
eager differ; hypothesis prints the smallest it finds. `pytest -m slow tests/test_documents_fuzz.py` tries thousands.
"""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mistral, tiny_neox
from test_documents import STORES, assert_alone


@st.composite
def cases(draw):
    """Config, rows of documents, length, chunk size and settings."""
    seq_len = draw(st.integers(2, 40))
    borders = st.sets(st.integers(0, seq_len), min_size=2, max_size=7)
    rows = [list(pairwise(sorted(draw(borders)))) for _ in range(draw(st.integers(1, 3)))]
    if all(stop - start == 1 for row in rows for start, stop in row):
        rows[0] = [(0, seq_len)]  # a loss needs a document of two tokens
    kv_heads = draw(st.sampled_from([0, 1, 2, 4]))
    window = draw(st.sampled_from([0, 0, 0, 1, 2, 5, 9, 20]))
    kernel = draw(st.sampled_from(["torch_cpu", "naive"])) if not window else "auto"
    if window:
        make = draw(st.sampled_from([tiny_mistral, tiny_gpt_oss, tiny_gemma2]))
        config = make(num_key_value_heads=kv_heads or 4, sliding_window=window)
    else:
        config = tiny_llama(num_key_value_heads=kv_heads) if kv_heads else tiny_neox()
    return config, rows, seq_len, draw(st.integers(1, seq_len)), {**draw(st.sampled_from(STORES)), "kernel": kernel}


def check(case):
    config, rows, seq_len, chunk, how = case
    assert_alone(config, rows, seq_len, chunk, **how)


def test_a_hundred_cases():
    settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)(
        given(cases())(check)
    )()


@pytest.mark.slow
def test_thousands_of_cases():
    settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))(given(cases())(check))()
