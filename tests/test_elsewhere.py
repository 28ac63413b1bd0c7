"""What `elsewhere.py` finds on a device that is not the host, in a process that has such a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("elsewhere.py")


@pytest.mark.parametrize("chosen", ["not commands", pytest.param("commands", marks=pytest.mark.slow)])
def test_what_belongs_on_the_device_is_there(chosen):
    words = ["-q", "-n", "0", "--tb", "short", "-k", chosen, str(FILE)]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=FILE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
