"""Options of pytest, and how tests share two cores."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    help = 'run the cells marked slow as well, and make the tables of nbs/results anew'
    parser.addoption('--slow', action='store_true', help=help)


def pytest_collection_modifyitems(config, items):
    "Each notebook may run anywhere; the tests of another file stay together, for they share runs"
    alone = ('test_notebooks.py', 'test_exercises.py')
    shared = config.pluginmanager.hasplugin('xdist')
    for item in items:
        if shared and item.path.name not in alone:
            item.add_marker(pytest.mark.xdist_group(Path(item.path).stem))
