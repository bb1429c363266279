"""A study's forecast as its rows stand."""

from pathlib import Path

import pytest
from made_up import made_up_study
from tiny import TinyStudy

from search.ledger import StopKind, TicketState
from search.outlook import Outlook
from search.worker.records import read_outlook

COMPLETE, PRUNED = TicketState.COMPLETE, TicketState.PRUNED


@pytest.fixture
def study(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    fates = [(COMPLETE, 0.4), (COMPLETE, 0.45), (PRUNED, 0.1)]
    return made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates, waiting=2)


def outlook(study: TinyStudy) -> Outlook:
    return read_outlook(study.ledger, study.config)


def test_read_outlook_of_a_study_that_goes_on_has_cost_speed_and_time_left(study: TinyStudy) -> None:
    found = outlook(study)

    document = found.to_json()
    assert (document["slot_epochs"], document["slot_epochs_at_most"]) == (20, 20)
    # An epoch of two slots takes four seconds.
    assert document["speed"] == {"seconds": 2.0, "slots": 2, "source": "as this study"}
    assert document["seconds_with_one_worker"] == 40.0
    assert found.seconds_left is not None
    assert document["seconds_left"] == found.seconds_left > 0
    assert "left at this pace, done " in found.line()
    assert document["short_against_full"]["trials"] == 2


def test_read_outlook_of_a_study_that_was_stopped_says_that_nothing_is_left(study: TinyStudy) -> None:
    study.ledger.stop(study.config.name, "asked", StopKind.ASKED)

    found = outlook(study)

    assert found.seconds_left == 0
    assert found.line().startswith("5 trainings (20 slot-epochs); nothing is left to train; 2 trials ran to the end")
