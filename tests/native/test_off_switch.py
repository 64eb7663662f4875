"""``LIGHTNING_INIT_NATIVE=0`` in a fresh process: nothing compiled is loaded, and the numbers stay the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lightning_init.native import OFF_SWITCH

pytestmark = pytest.mark.processes

PROGRAM = """
import json, sys
from lightning_init import native
import torch
from lightning_init.monitor.moments import moments_of, signal_variance, variance

generator = torch.Generator().manual_seed(0)
numbers = []
cases = [((256, 40), 1, 0.0), ((64, 300), 1, 5.0), ((4, 6, 33, 40), 1, -1.0), ((1000,), None, 0.3)]
for shape, unit_dim, mean in cases:
    moments = moments_of(torch.randn(shape, generator=generator) + mean, unit_dim)
    numbers += [moments.squares, float(variance(moments)), float(signal_variance(moments))]
print(json.dumps([native.sums is not None, "lightning_init.native._sums" in sys.modules, numbers]))
"""


def measured(switch: str | None) -> tuple[bool, bool, list[float]]:
    """Whether a fresh Python with this switch uses the compiled code, whether it has loaded it, and its numbers."""
    environment = {name: value for name, value in os.environ.items() if name != OFF_SWITCH}
    if switch is not None:
        environment[OFF_SWITCH] = switch
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True, timeout=100
    )
    uses, has_loaded, numbers = json.loads(done.stdout)
    return uses, has_loaded, numbers


def test_off_switch_leaves_the_compiled_code_alone() -> None:
    assert OFF_SWITCH == "LIGHTNING_INIT_NATIVE"  # as README.md has it
    *on, compiled = measured(None)
    *off, in_torch = measured("0")
    assert on == [True, True]
    assert off == [False, False]
    assert compiled == pytest.approx(in_torch, rel=1e-7, abs=0)
    assert compiled != in_torch  # else both came from the same code


def test_off_switch_takes_no_other_value() -> None:
    for switch in ("", "1", "false"):
        assert measured(switch)[:2] == (True, True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it has one thread")
def test_native_alone_finds_the_threads_of_torch() -> None:
    """They are looked up once, when the compiled code is imported: before torch, there would be none to find."""
    program = "from lightning_init import native; import ctypes; print(hasattr(ctypes.CDLL(None), 'GOMP_parallel'))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "True"
