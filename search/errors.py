"""Every exception that `search` raises on purpose, and the exit codes of its commands."""

from typing import ClassVar

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
"""The study stopped itself: another start would end like this one until somebody mends the cause and takes it up."""
EXIT_INTERRUPTED = 130


def install_extra(extra: str) -> str:
    """How to get the packages of an extra; the same words in every error. The package is installed from a clone."""
    return f"pip install '.[{extra}]' in the clone of yolosearch"


class SearchError(Exception):
    """Root of the tree. Exit code 1: the run failed."""

    exit_code: ClassVar[int] = EXIT_FAILED


class UserInputError(SearchError):
    """Something the user can fix. One line naming file, key, value and what is allowed. Exit code 2."""

    exit_code = EXIT_BAD_INPUT


class StudyConfigError(UserInputError):
    """A study file with an unknown key, an impossible value or a missing file."""


class StudyConflictError(UserInputError):
    """The study exists already and differs from what was asked."""


class UnknownStudyError(UserInputError):
    """No study of that name in the database."""


class DatabaseError(SearchError):
    """The database cannot be reached or has a schema that this version cannot use."""


class ForeignSchemaError(DatabaseError, UserInputError):
    """The schema belongs to another application; nothing was written."""


class OlderSchemaError(DatabaseError):
    """The schema is that of an older version; who trains upgrades it, who only reads does not."""


class LeaseLostError(SearchError):
    """Another worker holds the ticket now; nothing was written."""


class StudyStoppedError(SearchError):
    """The study gives out no more trials. Exit code 3: for example after too many failed trials in a row.

    Attributes:
        planned: Somebody wanted it so, in the study file or by `yolosearch stop`: nothing is wrong.
    """

    exit_code = EXIT_STOPPED

    def __init__(self, message: str, *, planned: bool = False) -> None:
        """Keeps the message."""
        super().__init__(message)
        self.planned = planned
