"""Reading JSON files that people and other tools wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters.console.errors import InputError
from converters.files.stand_ins import check_itself


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises InputError where the file is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        check_itself(path)
        place = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path} is not valid JSON{place}; correct it, or fetch it again.") from None
