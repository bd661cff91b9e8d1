import json

from accord.federation.engine import Count
from accord.stages.traffic import load_all_traffic, load_traffic, save_traffic, traffic_rows, write_traffic


def test_counts_survive_being_written(job, tmp_path):
    job.traffic.add("b", "score", 10, 1, absent=False)
    job.traffic.add("b", "score", 20, 2, absent=True)
    job.traffic.add("a", "router", 5, 6, absent=False)
    expected = [("a", "router", 1, 5, 6, 0), ("b", "score", 2, 30, 3, 1)]
    assert traffic_rows(job.traffic) == expected
    write_traffic(job, tmp_path / "traffic.json")
    job.traffic.add("a", "card", 1, 1, absent=False)
    load_traffic(job, tmp_path / "traffic.json")
    assert traffic_rows(job.traffic) == expected


def test_loading_goes_on_in_the_same_counts(job, tmp_path):
    """Engines hold on to the run's traffic, so it must stay the same object."""
    traffic = job.traffic
    job.traffic.add("a", "score", 10, 1, absent=False)
    write_traffic(job, tmp_path / "traffic.json")
    load_traffic(job, tmp_path / "traffic.json")
    traffic.add("a", "score", 10, 1, absent=False)
    assert job.traffic.counts["a", "score"] == Count(2, 20, 2, 0)


def test_refused_questions_are_kept(job, tmp_path):
    job.traffic.counts["a", "score"] = Count(1, 10, 1, 1, 3)
    job.traffic.counts["b", "score"] = Count(1, 10, 1, 1)
    write_traffic(job, tmp_path / "traffic.json")
    load_traffic(job, tmp_path / "traffic.json")
    assert traffic_rows(job.traffic) == [("a", "score", 1, 10, 1, 1, 3), ("b", "score", 1, 10, 1, 1)]


def test_without_a_file_there_was_no_traffic(job, tmp_path):
    job.traffic.add("a", "score", 10, 1, absent=False)
    load_traffic(job, tmp_path / "none.json")
    assert traffic_rows(job.traffic) == []


def test_the_stages_add_up(job):
    """Router 5 down and 6 up; align 10 down and 1 up, then 20 and 2: kinds stay apart and messages of a kind add up."""
    job.traffic.add("a", "router", 5, 6, absent=False)
    save_traffic(job, "router")
    assert traffic_rows(job.traffic) == []
    job.traffic.add("a", "score", 10, 1, absent=True)
    save_traffic(job, "align")
    assert json.loads((job.path / "traffic" / "align.json").read_text()) == [["a", "score", 1, 10, 1, 1]]
    job.traffic.add("a", "score", 20, 2, absent=False)
    save_traffic(job, "later")
    load_all_traffic(job)
    load_all_traffic(job)  # again: nothing is counted twice
    assert traffic_rows(job.traffic) == [("a", "router", 1, 5, 6, 0), ("a", "score", 2, 30, 3, 1)]
