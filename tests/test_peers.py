"""What processes say to each other; here they are threads with a dict for the job's store."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm import ConfigError, DistributedError, peers
from jaxllm.distributed import LEFT, beat_key
from jaxllm.peers import CHUNK, Peers, Ring, peers_of

PATIENCE = 0.3


class Board:
    """Stands in for JAX's key-value store."""

    def __init__(self):
        self.values, self.changed, self.is_down = {}, threading.Condition(), False

    def put(self, key, value):
        if self.is_down:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: no route.\nMore.")
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key, seconds=0):
        if self.is_down:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: no route.\nMore.")
        with self.changed:
            self.changed.wait_for(lambda: key in self.values, seconds)
            return self.values.get(key)

    def delete(self, folder):
        for key in [key for key in self.values if key.startswith(f"{folder}/")]:
            del self.values[key]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr(peers, "LOOK", 0.02)


def rings(count=2, board=None):
    board = board or Board()
    ids = tuple(range(count))
    return [Ring(ids, me, board, PATIENCE) for me in ids]


def together(*calls):
    """What each call returns or raises; each is a process."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def test_processes_that_say_the_same_agree():
    ones = rings(3)

    for ring in ones:
        ring.say("step", b"buffer", [1, 2])
        ring.say("step", b"other")

    assert together(*(ring.agree for ring in ones)) == [None] * 3


def test_a_difference_in_what_is_done_is_an_error_on_both_sides():
    one, other = rings()
    one.say("step decode[2]")
    other.say("end a call by KeyboardInterrupt")

    errors = together(one.agree, other.agree)

    assert all(isinstance(error, DistributedError) for error in errors)
    assert all("end a call by KeyboardInterrupt" in str(error) for error in errors)
    assert all("do not do the same: event 0 is" in str(error) for error in errors)


def test_a_difference_in_the_data_alone_is_an_error_too():
    one, other = rings()
    one.say("step decode[2]", b"1")
    other.say("step decode[2]", b"2")

    with pytest.raises(DistributedError, match="do not do the same"):
        one.agree()


def test_who_has_no_difference_with_its_next_learns_of_that_of_others():
    ones = rings(3)
    for ring, what in zip(ones, ["a", "a", "b"], strict=True):  # 0 agrees with 1
        ring.say(what)
    errors = together(ones[0].agree, ones[1].agree)

    ones[0].say("c")
    assert errors[0] is None
    assert isinstance(errors[1], DistributedError)
    with pytest.raises(DistributedError, match="Processes 1 and 2 do not do the same"):
        ones[0].agree()


def test_a_problem_is_final():
    one, other = rings()
    one.say("a")
    other.say("b")
    together(one.agree, other.agree)

    one.say("c")
    other.say("c")

    assert all(isinstance(e, DistributedError) for e in together(one.agree, other.agree))


def test_a_process_may_be_late_for_as_long_as_it_lives():
    board = Board()
    one, other = rings(board=board)
    beats, done = iter(range(1000)), threading.Event()

    def live_and_come():
        for _ in range(20):
            board.put(beat_key(1), str(next(beats)))
            done.wait(PATIENCE / 10)
        other.say("step")
        other.agree()

    one.say("step")

    assert together(one.agree, live_and_come) == [None, None]


def test_a_process_that_is_silent_is_given_up():
    board = Board()
    one, _ = rings(board=board)
    board.put(beat_key(1), "17")
    one.say("step")

    with pytest.raises(DistributedError, match="Process 1 has not been heard of for 0 s"):
        one.agree()


def test_a_process_whose_script_has_ended_is_not_waited_for():
    board = Board()
    one, _ = rings(board=board)
    board.put(beat_key(1), LEFT)
    one.say("step")

    with pytest.raises(DistributedError, match="Process 1 has ended its script, and process 0"):
        one.agree()


def test_what_a_process_said_before_it_left_counts():
    board = Board()
    one, other = rings(board=board)
    one.say("step")
    other.say("step")
    board.put(beat_key(1), LEFT)

    assert one.agree() is None


def test_a_coordinator_that_is_gone_is_named():
    board = Board()
    _, one = rings(board=board)
    board.is_down = True

    one.say("step")  # raises nothing: it is used where errors are cleared up

    with pytest.raises(DistributedError, match=r"cannot reach process 0.*UNAVAILABLE: no route\)"):
        one.agree()


def test_a_wait_for_arrays_ends_when_the_next_process_is_silent():
    board = Board()
    one, other = rings(board=board)
    one.say("step")
    other.say("step")
    board.put(beat_key(1), "17")
    never = SimpleNamespace(is_ready=lambda: False)

    with pytest.raises(DistributedError, match="not been heard of"):
        one.wait([never])


def test_a_wait_for_arrays_that_are_there_returns():
    one, other = rings()
    one.say("step")
    other.say("step")

    assert one.wait([jax.device_put(np.zeros(3))]) is None


def test_the_least_of_all_is_everyones():
    ones = rings(3)

    found = together(*(lambda r=r: r.least("memory", 10 - r.me) for r in ones))
    again = together(*(lambda r=r: r.least("memory", 5 + r.me) for r in ones))

    assert (found, again) == ([8] * 3, [5] * 3)


def test_old_events_are_deleted_from_the_store():
    board = Board()
    one, other = rings(board=board)

    for i in range(3 * CHUNK + 1):
        one.say(f"step {i}")
        other.say(f"step {i}")
        one.agree()
        other.agree()

    assert 2 * CHUNK < len(board.values) < 5 * CHUNK


def test_an_error_of_the_devices_is_explained_where_there_are_several_processes():
    (one, _), error = rings(), jax.errors.JaxRuntimeError("INTERNAL: connection closed by peer")
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")

    assert "could not compute a step together" in str(one.explain(error))
    assert one.problem is not None
    assert one.explain(full) is full
    assert Peers().explain(error) is error


def test_what_one_process_alone_can_do_is_refused_to_several():
    with pytest.raises(ConfigError, match=r"reshard is .* in processes 0, 1\. Make another LLM\."):
        rings()[0].refuse("reshard", "Make another LLM.")

    assert Peers().refuse("reshard", "Make another LLM.") is None


def test_one_process_agrees_with_itself():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))
    alone = peers_of(mesh)
    alone.say("anything")

    assert type(alone) is Peers
    assert alone.agree() is None
    assert alone.wait([]) is None
    assert alone.least("memory", 3) == 3


def fake_mesh(*processes):
    devices = np.array([SimpleNamespace(process_index=i) for i in processes], object)
    return SimpleNamespace(devices=devices)


@pytest.mark.parametrize(
    ("meshes", "said"),
    [
        ([fake_mesh(0, 0)], r"All 2 devices of the model are of process 0, and this is process 1"),
        ([fake_mesh(0, 0), fake_mesh(1, 1)], r"data_parallel_size=2 would spread engines over"),
    ],
)
def test_devices_of_other_processes_alone_are_refused(monkeypatch, meshes, said):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    with pytest.raises(ConfigError, match=said):
        peers_of(*meshes)


def test_a_mesh_of_one_process_of_the_job_is_its_own_business(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    assert type(peers_of(fake_mesh(1, 1))) is Peers
