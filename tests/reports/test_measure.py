import time

from cache_pipeline.reports.bench import BenchResult, BenchRow
from cache_pipeline.reports.measure import side_by_side


def test_rates_are_items_per_second_of_each_contender():
    def slow():
        time.sleep(0.02)
        return 10

    def fast():
        time.sleep(0.005)
        return 10

    rates = side_by_side({"slow": slow, "fast": fast}, seconds=0.05)
    assert 250 < rates["slow"] <= 500
    assert rates["fast"] > 2 * rates["slow"]


def test_contenders_take_turns_and_the_first_call_is_not_counted():
    calls = []

    def contender(name):
        def work():
            calls.append(name)
            if calls.count(name) == 1:
                time.sleep(0.05)
            time.sleep(0.001)
            return 1

        return work

    rates = side_by_side({"a": contender("a"), "b": contender("b")}, seconds=0.0)
    assert calls == ["a", "b"] * 4
    assert min(rates.values()) > 100


def test_a_row_states_its_ratio_to_the_peer_and_its_share_of_the_limit():
    row = BenchRow("train, steps/s", ours=90.0, peer=3.0, peer_name="theirs", limit=100.0)
    assert row.to_json() == {
        "case": "train, steps/s",
        "ours": 90.0,
        "peer": 3.0,
        "peer_name": "theirs",
        "ratio": 30.0,
        "limit": 100.0,
        "of_limit": 0.9,
    }


def test_a_row_without_a_peer_has_no_ratio():
    result = BenchResult("a machine", (BenchRow("load", ours=5.0),))
    assert result.to_json()["rows"][0]["ratio"] is None
    assert any(line.startswith("load") for line in result.lines())
