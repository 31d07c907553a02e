"""What every command sets up for its process before libraries are loaded."""

from __future__ import annotations

import os
import pwd
import resource
import tempfile
from contextlib import suppress

_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where Python's getpass looks before the passwd entry


def prepare_process() -> None:
    """Allow many open files, and set the user's name and home where the system has none."""
    _allow_many_files()
    _name_user()
    _find_home()


def _allow_many_files() -> None:
    """Raise this process's limit of open files as far as allowed: a large model has hundreds, all open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS refuses an unlimited number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _name_user() -> None:
    """Name a user without a passwd entry, as in many containers: torch names its cache folder after the user."""
    if not any(os.environ.get(name) for name in _USER_VARIABLES) and _entry() is None:
        os.environ["USER"] = _name()


def _find_home() -> None:
    """Have libraries keep their caches in the folder of temporary files where the home is not writable."""
    entry = _entry()
    home = os.environ.get("HOME") or (entry.pw_dir if entry else "")
    if home and os.access(home, os.W_OK | os.X_OK):
        return
    try:
        instead = os.path.join(tempfile.gettempdir(), "llama-" + _name())
    except OSError:  # no folder for temporary files either
        return
    if not home:
        os.environ["HOME"] = instead  # otherwise "~" isn't expanded, and a folder of that name is made
    os.environ.setdefault("TRITON_HOME", instead)
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(instead, "matplotlib"))


def _entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def _name() -> str:
    return f"uid{os.getuid()}"
