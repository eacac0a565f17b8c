import threading

import pytest

from tfdist.training.ps.in_flight import PartsInFlight


class Value:
    """A closure on its way."""

    def __init__(self, name, *, ended):
        self.name = name
        self._event = threading.Event()
        if ended:
            self.end()

    @property
    def has_ended(self):
        return self._event.is_set()

    def end(self):
        self._event.set()


def fetch(value):
    assert value._event.wait(10)
    return value.name


class Starts:
    """Parts "a", "b", … that end at once or when told."""

    def __init__(self, **ended):
        self.values = {name: Value(name, ended=end) for name, end in ended.items()}
        self.places = {}

    def __iter__(self):
        return iter(
            [lambda place, v=v: self.places.update({v.name: place}) or v for v in self.values.values()]
        )


@pytest.fixture
def late():
    return []


@pytest.fixture
def parts(late):
    return PartsInFlight(num_places=3, fetch=fetch, end_late=late.append)


def test_the_first_parts_are_enough(parts, late):
    starts = Starts(a=True, b=False, c=True)
    assert parts.run([*starts], num_wanted=2) == {0: "a", 2: "c"}
    assert late == []


def test_all_are_waited_for_where_all_are_wanted(parts):
    starts = Starts(a=True, b=False, c=True)
    threading.Timer(0.05, starts.values["b"].end).start()
    assert parts.run([*starts], num_wanted=3) == {0: "a", 1: "b", 2: "c"}


def test_a_late_part_keeps_its_place(parts, late):
    first, second, third = (Starts(a=True, b=n != 0, c=True) for n in range(3))
    parts.run([*first], num_wanted=2)
    # Two places are left, and the third part is never started.
    assert parts.run([*second], num_wanted=2) == {0: "a", 2: "b"}
    assert second.places == {"a": 0, "b": 2}
    first.values["b"].end()
    assert parts.run([*third], num_wanted=2) == {0: "a", 1: "b", 2: "c"}
    assert late == ["b"]


def test_a_place_that_gets_free_takes_a_part_that_waits(parts, late):
    """Or a step would wait for a worker that hangs, while another one has nothing to do."""
    first, second = Starts(a=True, b=False, c=True), Starts(a=True, b=False, c=True)
    parts.run([*first], num_wanted=2)
    threading.Timer(0.05, first.values["b"].end).start()
    assert parts.run([*second], num_wanted=2) == {0: "a", 1: "c"}
    assert second.places == {"a": 0, "b": 2, "c": 1}
    second.values["b"].end()
    parts.wait_for_late()
    assert late == ["b", "b"]
