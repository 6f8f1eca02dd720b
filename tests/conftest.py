"""Options of pytest."""


def pytest_addoption(parser):
    help = 'run the cells marked slow as well, and make the tables of nbs/results anew'
    parser.addoption('--slow', action='store_true', help=help)
