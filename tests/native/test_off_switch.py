"""The environment variable that leaves the compiled sums alone, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_init import native

SCRIPT = """
import json, sys, torch
from lightning_init import native, observe
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
with observe(model) as watching:
    model(torch.randn(1024, 64) + 3).square().mean().backward()
loaded = "lightning_init.native._sums" in sys.modules
print(json.dumps([native.sums is not None, loaded, watching.compute().values]))
"""


def measured(switch: str | None) -> tuple[bool, bool, dict[str, dict[str, float]]]:
    environment = {name: value for name, value in os.environ.items() if name != native.OFF_SWITCH}
    if switch is not None:
        environment[native.OFF_SWITCH] = switch
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    is_on, is_loaded, values = json.loads(run.stdout)
    return is_on, is_loaded, values


@pytest.mark.processes
def test_off_switch_leaves_the_compiled_sums_alone_and_the_numbers_as_they_are() -> None:
    assert native.OFF_SWITCH == "LIGHTNING_INIT_NATIVE"
    is_on, is_loaded, values = measured(None)
    assert (is_on, is_loaded) == (True, True)
    is_on, is_loaded, same = measured("0")
    assert (is_on, is_loaded) == (False, False)
    assert values.keys() == same.keys()
    for stat, by_layer in values.items():
        assert by_layer == pytest.approx(same[stat], rel=1e-7), stat


def test_contract_page_names_the_switch_and_the_functions() -> None:
    page = (Path(native.__file__).parent / "README.md").read_text()
    assert native.OFF_SWITCH in page
    assert native.sums is not None
    for name in [name for name in dir(native.sums) if not name.startswith("_")]:
        assert f"`{name}(" in page


@pytest.mark.processes
def test_off_switch_takes_no_other_value() -> None:
    for switch in ("", "1", "false"):
        is_on, is_loaded, _ = measured(switch)
        assert (is_on, is_loaded) == (True, True)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it has one thread")
def test_native_alone_finds_the_threads_of_torch() -> None:
    """They are looked up once, when the compiled code is imported: before torch, there would be none to find."""
    program = "from lightning_init import native; import ctypes; print(hasattr(ctypes.CDLL(None), 'GOMP_parallel'))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "True"
