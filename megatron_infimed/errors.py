"""The one exception that means "the user can mend this": the command line prints it as one line and exits with 2."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Says what is wrong, with the numbers, and the remedy, in one line."""


MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT)
MENDABLE = {*MISSING, *FORBIDDEN, *FULL, errno.EFBIG, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
"""What an OSError may be about that the user has to see to. Anything else (an I/O error, a mount that is gone, an evicted client) may be over when
the job starts again, or belong to one node."""
