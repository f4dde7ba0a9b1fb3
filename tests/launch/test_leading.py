"""What machine 0 decides, from what the machines report: no sockets, no processes, no clock."""

import signal

import pytest

from polyaccel.config.schema import PREEMPTED
from polyaccel.launch.interfaces import interface_of
from polyaccel.launch.leading import Leader, Machine, Rules


class Job:
    """Machines that report, and what each of them was told."""

    def __init__(self, machines=2, fewest=None, restarts=0, join_timeout_s=10, come=True):
        rules = Rules(machines, fewest or machines, restarts, join_timeout_s)
        self.leader = Leader(rules, choose_port=lambda attempt: 100 + attempt, now=0)
        self.names = {rank: Machine(rank, f"host{rank}", 2) for rank in range(machines)}
        for rank in range(machines) if come else ():
            self.leader.joined(self.names[rank], 0)

    def told(self):
        """What was said since the last time, by machine: kind, or what else there is to it."""
        found = {}
        while self.leader.outbox:
            rank, message = self.leader.outbox.popleft()
            found.setdefault(rank, []).append(message)
        return found

    def words(self, rank=0):
        return [message.get("words", message["type"]) for message in self.told().get(rank, [])]


def test_a_job_begins_when_all_machines_have_come_and_its_processes_are_numbered_in_their_order():
    job = Job(come=False)
    job.leader.joined(job.names[1], 0)
    assert job.told() == {}
    job.leader.joined(job.names[0], 1)
    place = {"type": "start", "attempt": 0, "num_processes": 4, "machines": 2, "port": 100}
    assert job.told() == {0: [{**place, "first": 0}], 1: [{**place, "first": 2}]}


def test_a_job_is_over_when_the_last_machine_has_ended():
    job = Job()
    job.told()
    job.leader.ended(1, 0, 5)
    assert job.told() == {}
    job.leader.ended(0, 0, 6)
    finish = [{"type": "finish", "code": 0, "words": ""}]
    assert job.told() == {0: finish, 1: finish}
    assert job.leader.is_over


def test_a_failure_stops_the_other_machines_and_starts_all_again_on_a_new_port():
    job = Job(restarts=1)
    job.told()
    job.leader.failed(1, 0, 3, 137)
    words = "process 3 on machine 1 (host1) was killed by SIGKILL"
    assert job.told() == {0: [{"type": "stop", "attempt": 0, "words": words}]}
    job.leader.ended(0, 0, 5)
    job.leader.ended(1, 0, 5)
    assert job.words(1) == [f"{words}; restart 1 of 1 in 1 s"]
    job.leader.tick(5.9)
    assert job.told() == {}
    job.leader.tick(6)
    assert [(m["attempt"], m["port"]) for m in job.told()[1]] == [(1, 101)]
    job.leader.failed(0, 0, 0, 1)  # of the attempt before: a late word
    assert job.told() == {}
    job.leader.failed(0, 1, 1, 7)
    job.leader.ended(0, 1, 8)
    job.leader.ended(1, 1, 8)
    assert job.told()[0] == [
        {"type": "finish", "code": 7, "words": "process 1 on machine 0 (host0) failed with exit code 7"}
    ]


def test_of_failures_that_come_together_the_one_that_explains_the_others_is_told():
    job = Job()
    job.told()
    job.leader.failed(0, 0, 1, 1)  # an exchange with a machine that has gone
    job.leader.ended(0, 0, 5)
    job.leader.lost(1, "its launcher has ended", 5)
    assert job.words()[-1] == "machine 1 (host1) with processes 2, 3 is lost: its launcher has ended"
    job = Job()
    job.leader.failed(0, 0, 1, 1)
    job.leader.failed(1, 0, 2, 128 + signal.SIGSEGV)
    for rank in (0, 1):
        job.leader.ended(rank, 0, 5)
    assert job.words()[-1] == "process 2 on machine 1 (host1) was killed by SIGSEGV"


def test_a_signal_on_one_machine_is_for_all_and_nothing_is_started_again():
    job = Job(restarts=3)
    job.told()
    job.leader.signalled(1, signal.SIGTERM)
    assert job.told() == {0: [{"type": "signal", "number": signal.SIGTERM}]}
    for rank, process in ((0, 0), (1, 2)):
        job.leader.failed(rank, 0, process, PREEMPTED)
        assert job.told() == {}, "every process has its own time to leave"
        job.leader.ended(rank, 0, 5)
    assert [m["code"] for m in job.told()[1]] == [PREEMPTED]


def test_processes_that_have_saved_to_be_continued_later_are_not_started_again():
    job = Job(restarts=3)
    job.leader.failed(0, 0, 0, PREEMPTED)
    for rank in (0, 1):
        job.leader.ended(rank, 0, 5)
    assert job.words()[-1] == "process 0 on machine 0 (host0) has saved its state and left (exit code 75)"


def test_a_signal_before_all_machines_have_come_ends_the_job():
    job = Job(come=False)
    job.leader.joined(job.names[0], 0)
    job.leader.signalled(0, signal.SIGINT)
    assert job.told()[0] == [{"type": "finish", "code": 130, "words": "SIGINT on machine 0 (host0)"}]


@pytest.mark.parametrize(("machines", "left", "goes_on_with"), [(2, 1, 1), (4, 3, 2), (6, 5, 3), (6, 2, 2)])
def test_a_job_goes_on_with_as_many_machines_as_divide_all_of_them(machines, left, goes_on_with):
    job = Job(machines, fewest=1, restarts=1)
    for rank in range(left, machines):
        job.leader.lost(rank, "no sign of life", 5)
    for rank in range(left):
        job.leader.ended(rank, 0, 5)
    job.told()
    job.leader.tick(14)
    assert job.told() == {}, "the lost ones may come back"
    job.leader.tick(15)
    told = job.told()
    assert [m["num_processes"] for rank in range(goes_on_with) for m in told[rank]] == [2 * goes_on_with] * goes_on_with
    assert [m["type"] for rank in range(goes_on_with, left) for m in told[rank]] == ["wait"] * (left - goes_on_with)


def test_a_machine_that_comes_back_takes_part_in_the_restart():
    job = Job(restarts=1)
    job.leader.lost(1, "its launcher has ended", 5)
    job.leader.ended(0, 0, 5)
    job.leader.tick(7)
    job.told()
    job.leader.joined(job.names[1], 8)
    assert [m["type"] for m in job.told()[1]] == ["start"]


def test_machines_that_do_not_come_end_the_job_and_are_named():
    job = Job(3, come=False)
    job.leader.joined(job.names[0], 0)
    job.leader.tick(10)
    assert job.words() == ["machines 1, 2 did not come within 10 s (join_timeout_s)"]
    job = Job(restarts=1)
    job.leader.lost(1, "its launcher has ended", 5)
    job.leader.ended(0, 0, 5)
    job.told()
    job.leader.tick(15)
    (message,) = job.told()[0]
    assert message["words"].endswith(
        "is lost: its launcher has ended; machine 1 did not come within 10 s (join_timeout_s)"
    )


def test_the_interface_of_an_own_address_is_found():
    assert interface_of("127.0.0.1") == interface_of("127.3.2.1") == interface_of("::1") == "lo"
    assert interface_of("203.0.113.9") is None
