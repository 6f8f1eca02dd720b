"""What importing the package does, each import in a fresh process, and what all of it promises."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / 'transformers_tut').glob('[!_]*.py'))
MODULES = ['transformers_tut'] + [f'transformers_tut.{path.stem}' for path in PATHS]


def python(code, *options):
    command = [sys.executable, *options, '-c', code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


HEAVY = {'torchvision', 'nbdev', 'fastcore', 'matplotlib', 'pytorch_lightning'}
LIGHT = {  # what the import of a module must not bring with it
    'transformers_tut': HEAVY | {'torch'},
    'transformers_tut.settings': HEAVY | {'torch', 'tyro'},
    'transformers_tut.files': HEAVY | {'pooch', 'pandas'},
    'transformers_tut.attention': HEAVY,
    'transformers_tut.encoder': HEAVY,
}


@pytest.mark.parametrize('module', LIGHT)
def test_import_is_silent_and_light(module):
    code = f"import sys, {module}; sys.exit(' '.join({LIGHT[module]} & set(sys.modules)))"
    run = python(code, '-W', 'error')
    assert (run.stdout, run.stderr.strip()) == ('', '')


# torchmetrics imports torchvision by itself, so sys.modules does not tell: ask who imports what
QUIET = """
import builtins, importlib, logging, random, socket
import matplotlib, numpy, torch, pytorch_lightning

class NoSocket(socket.socket):
    def __init__(self, *args, **kwargs): raise AssertionError('a socket was opened')

def guarded(name, scope=None, *args, real=builtins.__import__, **kwargs):
    ours = (scope or {}).get('__name__', '').startswith('transformers_tut')
    assert not (ours and name.split('.')[0] in ('torchvision', 'nbdev', 'fastcore')), name
    return real(name, scope, *args, **kwargs)

def state():
    generators = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
    settings = torch.get_default_dtype(), torch.get_num_threads(), dict(matplotlib.rcParams)
    return *generators, *settings, logging.getLogger('pytorch_lightning').level

before = state()
socket.socket, builtins.__import__ = NoSocket, guarded
for module in <modules>:
    importlib.import_module(module)
    assert state() == before, f'importing {module} changes global state'
"""


def test_imports_have_no_side_effects():
    run = python(QUIET.replace('<modules>', repr(MODULES)))
    assert run.returncode == 0, run.stderr


def public():
    "Every public name that is defined here, not imported: (module, name, object)"
    for module in map(importlib.import_module, MODULES[1:]):
        for name in getattr(module, '__all__', []):
            yield module.__name__, name, getattr(module, name)


def test_every_public_definition_is_documented():
    undocumented = []
    for module, name, thing in public():
        if not callable(thing):
            continue
        if not inspect.getdoc(thing):
            undocumented.append(f'{module}.{name}: docstring')
        if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
            if '__init__' not in vars(thing):
                continue
            thing = thing.__init__
        comments = docments(thing)
        for parameter in inspect.signature(thing).parameters.values():
            free = parameter.name == 'self' or parameter.kind == parameter.VAR_KEYWORD
            if not free and comments.get(parameter.name) is None:
                undocumented.append(f'{module}.{name}: {parameter.name}')
    assert undocumented == []


def test_the_surface_stays_small():
    assert len(list(public())) <= 170


def test_readme_has_exactly_two_commands():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    commands = re.findall(r'^```(?:bash|sh)\n(.*?)^```', text, flags=re.M | re.S)
    assert commands == ['pip install -e . && tut_reverse\n', 'pip install -e ".[dev]" && pytest\n']
