"""Every exception that `search` raises on purpose."""


class SearchError(Exception):
    """Root of the tree. Exit code 1: the run failed."""


class UserInputError(SearchError):
    """Something the user can fix. One line naming file, key, value and what is allowed. Exit code 2."""


class StudyConfigError(UserInputError):
    """A study file with an unknown key, an impossible value or a missing file."""


class StudyConflictError(UserInputError):
    """The study exists already and differs from what was asked."""


class UnknownStudyError(UserInputError):
    """No study of that name in the database."""


class DatabaseError(SearchError):
    """The database cannot be reached or has a schema that this version cannot use."""


class LeaseLostError(SearchError):
    """Another worker holds the ticket now; nothing was written."""


class StudyStoppedError(SearchError):
    """The study gave up, for example after too many failed trials in a row."""
