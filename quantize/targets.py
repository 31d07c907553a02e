"""TPU slices by name, as --target takes them: how many chips each has."""

from __future__ import annotations

import re

from converters.errors import InputError

# In the names of v4 and v5p slices the number counts TensorCores, two to a chip; in those of v5e and v6e it counts
# chips (cloud.google.com/tpu/docs: v4, v5p, v5e, v6e).
_CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v5litepod": 1, "v6e": 1}


def target_chips(target: str) -> int:
    """``v4-16`` -> 8. Raises InputError for a name that isn't a slice's."""
    match = re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-(\d{1,5})", target)
    cores = int(match[2]) if match else 0
    per_chip = _CORES_PER_CHIP[match[1]] if match else 1
    if cores < 1 or cores % per_chip:
        raise InputError(f"Unknown target {target!r}; write a slice like v4-8, v4-16, v5p-16, v5e-8 or v6e-8.")
    return cores // per_chip
