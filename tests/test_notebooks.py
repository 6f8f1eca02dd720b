"""The notebooks' own tests, one process each: nbdev_test reuses its workers, and global state would leak."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [*sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), ROOT / "nbs" / "index.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, tmp_path):
    nbdev_test = Path(sys.executable).with_name("nbdev_test")
    run = subprocess.run(
        [nbdev_test, "--path", notebook.relative_to(ROOT), "--n_workers", "0", "--do_print"],
        cwd=ROOT,
        env=os.environ | {"PATH_CHECKPOINT": str(tmp_path)},  # no models of an earlier run
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "Success." in run.stdout, f"{run.stdout}\n{run.stderr}"
