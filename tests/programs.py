"""Programs that a test starts and that no Python package brings."""

import os
import shutil
from typing import NoReturn

import pytest


def need(package: str, *names: str) -> str:
    """Return the path of the first of these programs that is installed.

    Without one the test is skipped; where CI=true it fails, because CI must leave no test out.

    Args:
        package: the Debian package that has the program; `.ci/run` installs it.
        names: the program's names, the usual one first.
    """
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])
    for name in names:
        if path := shutil.which(name, path=places):
            return path
    reason = f"{names[0]} is not installed: apt-get install {package}"
    absent(f"{reason}, or run .ci/run as root" if os.environ.get("CI") == "true" else reason)


def absent(reason: str) -> NoReturn:
    """Skip the test; where CI=true fail it, because CI must leave no test out."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
