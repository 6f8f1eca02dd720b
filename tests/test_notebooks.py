"""The notebooks' own tests, and whether the modules are what the notebooks say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [*sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')), ROOT / 'nbs' / 'index.ipynb']


def nbdev(command, *options, cwd, **env):
    "Run a command of nbdev; a process of its own, since nbdev_test lets global state leak"
    program = Path(sys.executable).with_name(command)
    env = os.environ | {name: str(value) for name, value in env.items()}
    run = subprocess.run([program, *options], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, f'{run.stdout}\n{run.stderr}'
    return run.stdout


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path, request):
    options = ['--path', notebook.relative_to(ROOT), '--n_workers', '0', '--do_print']
    env = {'PATH_CHECKPOINT': tmp_path}  # no models of an earlier run
    if request.config.getoption('--slow'):
        options += ['--flags', 'slow']
        env['TUT_STUDIES'] = 'anew'
    assert 'Success.' in nbdev('nbdev_test', *options, cwd=ROOT, **env)


def files(folder):
    paths = [*(folder / 'nbs').glob('*.ipynb'), *(folder / 'transformers_tut').glob('*.py')]
    return {path.relative_to(folder).as_posix(): path.read_text('utf-8') for path in paths}


def test_modules_are_what_the_notebooks_export(tmp_path):
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', symlinks=True)
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    (tmp_path / 'transformers_tut').mkdir()
    shutil.copy(ROOT / 'transformers_tut' / '__init__.py', tmp_path / 'transformers_tut')
    nbdev('nbdev_clean', cwd=tmp_path)
    nbdev('nbdev_export', cwd=tmp_path)
    here, exported = files(ROOT), files(tmp_path)
    differ = [name for name in here | exported if here.get(name) != exported.get(name)]
    assert differ == [], 'run nbdev_clean and nbdev_export, and commit what they write'
