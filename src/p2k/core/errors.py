"""Errors a user can mend. Wrong shapes and values stay ValueError, wrong dtypes TypeError, as in torch."""


class P2KError(RuntimeError):
    """Base of the package's own errors: what was expected, what came, what to do. The CLI prints it bare."""


class BackendUnavailable(P2KError):
    """The requested backend cannot run on this tensor or machine."""


class MissingDependency(P2KError):
    """An optional package is not installed; the message names the extra that brings it."""


class DatasetMissing(P2KError):
    """A data set is neither on disk nor downloadable; the message says what to fetch and where to put it."""


class BudgetUnreachable(P2KError):
    """No layer width meets the requested parameter budget."""
