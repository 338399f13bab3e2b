"""The lazy stream of legal configs, beside all of them tried and sorted."""

from __future__ import annotations

import itertools

import pytest
from fake_op import H200, PartsConfig, example, op, parts_op

from vidrial.spec.choices import config_order, configs
from vidrial.spec.space import Stream


@pytest.mark.parametrize("n", [63, 130, 1023, 10007])
def test_ranked_is_every_legal_config_fastest_predicted_first(n: int) -> None:
    problem = example(n=n)
    # Without chunks the first part launches nothing, and stays as it is by default.
    every = [c for c in configs(PartsConfig) if c.chunk or c.first == PartsConfig().first]
    legal = {c: parts_op.seconds(problem, c, H200) for c in every if parts_op.reject(problem, c, H200) is None}
    found = list(parts_op.ranked(problem, H200))
    assert {c.config for c in found} == legal.keys() and len(found) == len(legal) >= 4
    assert [c.seconds for c in found] == pytest.approx(sorted(legal.values()), rel=1e-12)
    assert all(c.seconds == pytest.approx(legal[c.config], rel=1e-12) for c in found)
    assert found[0].config == parts_op.predicted(problem, H200) == min(legal, key=lambda c: (legal[c], config_order(c)))
    assert parts_op.space(problem, H200, limit=3).legal == tuple(found[:3])


def test_of_an_op_without_parts_ties_keep_the_order_of_declaration() -> None:
    found = [c.config for c in op.ranked(example(n=1000), H200)]
    assert len(found) == 16
    for _, tied in itertools.groupby(found, key=lambda c: op.seconds(example(n=1000), c, H200)):
        orders = [config_order(c) for c in tied]
        assert len(orders) >= 4 and orders == sorted(orders)


def test_a_stream_reads_its_source_once_and_no_further_than_asked() -> None:
    read: list[int] = []
    stream = Stream(read.append(n) or n for n in itertools.count())  # type: ignore[func-returns-value]
    assert (stream.get(2), stream.get(0), list(itertools.islice(stream, 3))) == (2, 0, [0, 1, 2])
    assert read == [0, 1, 2]
    assert Stream(iter("ab")).get(2) is None and list(Stream(iter("ab"))) == ["a", "b"]
