"""A journal keeps whole records and cuts off what a crash tore."""

from pathlib import Path

from alignpipe.training.journal import Journal


def test_records_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    assert journal.read() == []
    journal.append([{"i": 0}, {"i": 1}])
    journal.append([{"i": 2, "text": "안녕\n"}])
    assert journal.read() == [{"i": 0}, {"i": 1}, {"i": 2, "text": "안녕\n"}]


def test_damaged_record_and_those_after_it_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    journal.append([{"i": 0}, {"i": 1}, {"i": 2}])
    whole = path.read_bytes()
    line = len(whole) // 3
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert journal.read() == [{"i": 0}, {"i": 1}, {"i": 2}][: bit // 8 // line]
        assert path.stat().st_size == bit // 8 // line * line


def test_torn_record_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    journal.append([{"i": 0}, {"i": 1}])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = journal.read()
        assert kept == [{"i": 0}, {"i": 1}][: whole[:length].count(b"\n")]
        journal.append([{"i": 9}])
        assert journal.read() == [*kept, {"i": 9}]
