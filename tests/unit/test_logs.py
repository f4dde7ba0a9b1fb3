"""Loggers of a job: which process writes, in which order, and from which line."""

import logging

import pytest

from polyaccel import jobs
from polyaccel.errors import NotStartedError
from polyaccel.logs import get_logger
from polyaccel.testing.fake import FakeEngine
from polyaccel.topology import Topology


class Job(FakeEngine):
    """An engine that is one of several processes, and counts its barriers."""

    def __init__(self, index, count):
        super().__init__()
        self.topology = Topology(index, count, index, 1, count, "numpy")
        self.barriers = []
        self.collectives.barrier = self.barriers.append


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(jobs, "_engines", [])
    made = []

    def start(index=0, count=1):
        made.append(Job(index, count))
        jobs.adopt(made[-1])
        return made[-1]

    return start


def test_logging_before_the_first_accelerator_says_what_to_do(job):
    with pytest.raises(NotStartedError, match="'early' does not know its process") as caught:
        get_logger("early").info("too soon")
    assert "make the Accelerator" in caught.value.hint
    assert isinstance(caught.value, RuntimeError)  # what Accelerate raises


def test_only_the_main_process_writes_unless_all_are_asked_to(job, caplog):
    logger = get_logger("mine", "INFO")
    job(index=1, count=2)
    logger.info("from the main process")
    logger.info("from everyone", main_process_only=False)
    assert [record.message for record in caplog.records] == ["[RANK 1] from everyone"]


def test_in_order_every_process_takes_its_turn_between_barriers(job, caplog):
    engine = job(index=1, count=3)
    get_logger("mine", "INFO").warning("here", in_order=True, main_process_only=False)
    assert len(engine.barriers) == 3
    assert [record.message for record in caplog.records] == ["[RANK 1] here"]


def test_a_quiet_level_on_one_process_does_not_hold_up_the_others(job, caplog):
    engine = job(index=0, count=2)
    get_logger("quiet", "ERROR").info("unheard", in_order=True)
    assert len(engine.barriers) == 2
    assert not caplog.records


def test_the_record_names_the_line_that_logged(job, caplog):
    job()
    logger = get_logger("mine", "INFO")
    logger.info("plain")
    logger.warning_once("once")
    logger.warning_once("once")
    assert [(record.message, record.funcName) for record in caplog.records] == [
        ("plain", "test_the_record_names_the_line_that_logged"),
        ("once", "test_the_record_names_the_line_that_logged"),
    ]


def test_the_level_may_come_from_the_environment(job, monkeypatch):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
    assert get_logger("by_variable").logger.level == logging.ERROR
    monkeypatch.setenv("POLYACCEL_LOG_LEVEL", "debug")
    assert get_logger("by_variable").logger.level == logging.DEBUG


@pytest.fixture(autouse=True)
def root_level():
    before = logging.root.level
    yield
    logging.root.setLevel(before)
