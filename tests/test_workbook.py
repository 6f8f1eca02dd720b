"""The workbook as a learner meets it: the command, the files, and a kernel that runs one."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

from transformers_tut.workbook import write_workbooks

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ['00', '01', '02', '03', '04', '05', '06', '07', '08', '10', '13', '14', '15']
SHORT = '02_positional_encoding.ipynb'


def command(*options, cwd):
    entry = [sys.executable, '-c', 'import sys; sys.argv[0] = "tut_workbook"\n' + ENTRY]
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.run([*entry, *options], cwd=cwd, env=env, capture_output=True, text=True)


ENTRY = 'from transformers_tut.settings import run_command; run_command()'


def test_the_command_writes_all_lessons_and_touches_nothing_later(tmp_path):
    first = command(cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert [p.name[:2] for p in sorted((tmp_path / 'workbook').glob('*.ipynb'))] == LESSONS
    mine = tmp_path / 'workbook' / SHORT
    mine.write_text('half of my answers')
    (tmp_path / 'workbook' / '00_attention.ipynb').unlink()
    again = command(cwd=tmp_path)
    assert mine.read_text() == 'half of my answers'
    assert (tmp_path / 'workbook' / '00_attention.ipynb').exists()
    assert f'{SHORT} was there, and is as it was' in again.stdout


@pytest.mark.parametrize(
    'options, status, words',
    [
        (['no_such_lesson'], 2, 'there are 00_attention, 01_encoder'),
        (['20'], 2, 'there are no exercises in 20_speed.ipynb'),
        (['/dev/null'], 2, 'no lesson'),
        (['lessons/README.md'], 2, 'README.md is not a notebook'),
        (['02', '--out-dir', 'README.md'], 1, 'README.md'),
        (['--solution'], 2, 'solutions'),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(options, status, words, tmp_path):
    (tmp_path / 'lessons').mkdir()
    for name in ('README.md', 'lessons/README.md'):
        (tmp_path / name).write_text('# no notebook')
    run = command(*options, cwd=tmp_path)
    assert (run.returncode, 'Traceback' in run.stderr) == (status, False), run.stderr
    assert words in run.stdout + run.stderr


@pytest.mark.parametrize('by', ['02', 'positional_encoding', SHORT, str(ROOT / 'nbs' / SHORT)])
def test_a_lesson_is_found_by_number_name_and_path(by, tmp_path):
    written = write_workbooks(by, out_dir=tmp_path)
    assert [p.name for p in written if p.suffix == '.ipynb'] == [SHORT]


def test_workbooks_are_notebooks_that_colab_and_jupyter_can_open(tmp_path):
    for path in write_workbooks(out_dir=tmp_path):
        if path.suffix == '.ipynb':
            book = nbformat.read(path, as_version=4)
            nbformat.validate(book)
            code = [cell.source for cell in book.cells if cell.cell_type == 'code']
            # Colab installs the package first; the extension comes with it
            assert '/content' in code[0] and code[1] == '%load_ext transformers_tut.workbook'
            assert code[-1].startswith('%passed ')


@pytest.mark.parametrize('solutions', [False, True])
def test_a_workbook_runs_to_its_end_whatever_is_written(solutions, tmp_path):
    write_workbooks('02', out_dir=tmp_path, solutions=solutions)
    book = nbformat.read(tmp_path / SHORT, as_version=4)
    # raises where a cell fails
    NotebookClient(book, resources={'metadata': {'path': str(tmp_path)}}, timeout=300).execute()
    (said,) = book.cells[-1].outputs
    *exercises, total = said.text.strip().splitlines()
    n = len(exercises)
    assert total == f'{n if solutions else 0} of {n} exercises pass'
    assert {line[0] for line in exercises} == {'✓' if solutions else '✗'}


# The magics, in a shell


@pytest.fixture
def run():
    "A function that runs cells in a new shell: what the last one printed"
    shell = InteractiveShell()

    def run(*cells):
        for cell in ['%load_ext transformers_tut.workbook', *cells]:
            with capture_output() as said:
                shell.run_cell(cell)
        return said.stdout

    run.names = shell.user_ns
    return run


RIGHT, WRONG = 'def double(x):\n    return 2 * x', 'def double(x):\n    return x'
SHOW, TEST = '%%check double 1/2\ny = double(3)', '%%check double 2/2\nassert y == 6'
SOLUTION, PASSED = f'%%solution double\n{RIGHT}', '%passed double'


def test_all_checks_must_have_run(run):
    assert '✗' in run(RIGHT, SHOW, PASSED)
    assert '✓' in run(TEST, PASSED)
    assert '✗' in run(WRONG, PASSED)  # written anew, and not checked
    assert 'does not pass' in run(SOLUTION)


def test_a_check_below_a_failure_says_that_it_was_not_run(run):
    assert 'not run' in run('def double(x):\n    return two * x', SHOW, TEST)
    assert '✓' in run('two = 2', SHOW, TEST, PASSED)  # nothing but a helper was missing


def test_a_check_that_the_learner_changed_runs(run):
    assert run(WRONG, SHOW, TEST, '%%check double 2/2\nprint(y)') == '3\n'


def test_the_lessons_own_goes_on_and_never_counts_as_the_learners(run):
    assert 'does not pass' in run(WRONG, SHOW, TEST, SOLUTION)
    assert run.names['y'] == run.names['double'](3) == 6
    assert '✗' in run(SHOW, TEST, PASSED)
    assert run.names['double'](1) == 2
    assert 'passes' in run(RIGHT, SHOW, TEST, SOLUTION)


def test_what_a_definition_did_to_its_input_is_undone(run):
    spoil = 'def double(x):\n    x += 2\n    return x'
    show = '%%check double 1/2\ny = double(t).sum()'
    run('import torch\nt = torch.ones(3)', spoil, show, TEST, SOLUTION)
    assert run.names['t'].tolist() == [1, 1, 1] and run.names['y'] == 6


def test_coming_back_to_an_exercise_brings_its_variables_back(run):
    start = 'import torch\nx, g = torch.tensor(3), torch.Generator()\ndef one():\n    return 1'
    check = '%%check double 1/1\ny = torch.randint(99, (), generator=g) + double(x) * one()'
    run(start, WRONG, check)
    first = run.names['y']
    run('x, y = torch.tensor(5), None\ndef one():\n    return 2', RIGHT, check)
    assert run.names['y'] == first - 3 + 3 * 2 * 2  # functions are as the learner left them


def test_a_solution_asked_for_first_leaves_the_learners_to_be_checked(run):
    assert '✓' in run(RIGHT, SOLUTION, SHOW, TEST, PASSED)


def test_workbooks_stay_out_of_the_lessons_folder(tmp_path):
    refused = command('--out-dir', str(ROOT / 'nbs' / 'mine'), cwd=tmp_path)
    assert refused.returncode == 2 and 'must be outside' in refused.stderr
