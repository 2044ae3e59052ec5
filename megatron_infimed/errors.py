"""The one exception that means "the user can mend this": the command line prints it as one line and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """Says what is wrong, with the numbers, and the remedy, in one line."""
