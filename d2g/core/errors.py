"""What can go wrong for a user, as exceptions whose text is the whole message.

UserError             exit 1   the job cannot go on; the text says what, got, expected, what to do
├── SettingError      exit 2   a wrong option or setting; names the nearest right one
└── Interrupted       exit 130 stopped by the user; says what is safe on disk
"""


class UserError(Exception):
    """Something the user can mend. `str(error)` is one line and stands alone."""

    exit_code = 1


class SettingError(UserError):
    """A setting with an unknown name or an impossible value."""

    exit_code = 2


class Interrupted(UserError):
    """Ctrl-C or SIGTERM, raised where everything worth keeping is on disk."""

    exit_code = 130
