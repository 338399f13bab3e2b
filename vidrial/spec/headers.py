"""Where the device library lies: the headers that every kernel may include."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vidrial.errors import ToolchainError
from vidrial.installation import refuse_lost_link


def vidrial_include() -> Path:
    """The directory that holds Vidrial's own headers, installed or in the source tree.

    Raises:
        ToolchainError: the installation lacks its templates.
    """
    refuse_lost_link("templates")
    spec = importlib.util.find_spec("vidrial.templates")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "include" / "vidrial" / "prelude.cuh").is_file():
            return Path(folder) / "include"
    raise ToolchainError(
        "the package vidrial.templates lacks include/vidrial/prelude.cuh: the installation is incomplete; reinstall vidrial"
    )
