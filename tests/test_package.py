"""What importing the package does, each import in a fresh process, and what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["transformers_tut"] + [
    f"transformers_tut.{path.stem}" for path in sorted((ROOT / "transformers_tut").glob("[!_]*.py"))
]


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["transformers_tut", "transformers_tut.attention"])
def test_import_is_silent_and_light(module):
    heavy = {"torchvision", "nbdev", "fastcore", "matplotlib", "pytorch_lightning"}
    run = python(f"import sys, {module}; sys.exit(' '.join({heavy} & set(sys.modules)))", "-W", "error")
    assert (run.stdout, run.stderr.strip()) == ("", "")


# torchmetrics imports torchvision by itself, so sys.modules tells nothing here: ask who imports what.
QUIET = """
import builtins, logging, random, socket
import numpy, torch, pytorch_lightning

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs): raise AssertionError("a socket was opened")

def guarded(name, scope=None, *args, real=builtins.__import__, **kwargs):
    ours = (scope or {{}}).get("__name__", "").startswith("transformers_tut")
    assert not (ours and name.split(".")[0] in ("torchvision", "nbdev", "fastcore")), f"imports {{name}}"
    return real(name, scope, *args, **kwargs)

def state():
    generators = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
    return *generators, torch.get_default_dtype(), logging.getLogger("pytorch_lightning").level

before = state()
socket.socket, builtins.__import__ = NoSocket, guarded
import {module}
assert state() == before, "global state changed"
"""


@pytest.mark.parametrize("module", MODULES)
def test_import_has_no_side_effects(module):
    run = python(QUIET.format(module=module))
    assert run.returncode == 0, run.stderr


def test_readme_has_exactly_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.M | re.S)
    assert commands == ["pip install -e . && tut_reverse\n", 'pip install -e ".[dev]" && pytest\n']
