"""Exercises are as good as their checks: stubs fail, solutions pass, and mistakes are caught."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from transformers_tut.workbook import _find_exercises, _read

ROOT = Path(__file__).resolve().parents[1]
TABLE = pd.read_csv(ROOT / 'nbs' / 'results' / 'exercises.csv', comment='#')
LESSONS = [p for p in sorted((ROOT / 'nbs').glob('[01]*.ipynb'))]


def measure(path):
    "What tools/mutants.py finds: one row for each exercise, and what it says"
    command = [sys.executable, ROOT / 'tools' / 'mutants.py', path]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{')]
    return rows, run.stdout + run.stderr


@pytest.mark.parametrize('lesson', LESSONS, ids=lambda path: path.stem)
def test_the_table_is_what_the_checks_catch(lesson):
    rows, said = measure(lesson)
    expected = TABLE[TABLE.lesson == lesson.stem].to_dict('records')
    assert len(rows) >= 2 and rows == expected, said


def test_there_are_enough_and_nearly_all_mutants_are_caught():
    assert len(TABLE) >= 30 and set(TABLE.lesson) == {p.stem for p in LESSONS}
    assert TABLE.mutants.min() >= 4
    assert TABLE.caught.sum() >= 0.9 * TABLE.mutants.sum()


@pytest.mark.parametrize('lesson', LESSONS, ids=lambda path: path.stem)
def test_each_exercise_has_hints_and_says_what_is_wanted(lesson):
    for exercise in _find_exercises(_read(lesson)):
        assert 1 <= len(exercise.hints) <= 3, exercise.name
        assert '"' in exercise.source.partition('return')[0], f'{exercise.name}: no docstring'


MEAN = 'def mean(xs):\n    "Their mean."\n    return sum(xs) / len(xs)'


@pytest.mark.parametrize(
    'check, caught, words',
    [
        ('assert mean([1, 2, 6]) == 3', 5, ''),
        ('assert mean([0]) == 0', 3, 'nobody notices'),
        ('assert True', None, 'mean must fail as a stub'),
        ('assert mean([1]) == 2', None, 'pass as it stands'),
    ],
)
def test_a_weak_check_shows(check, caught, words, tmp_path):
    cells = [
        {'cell_type': 'code', 'id': tag, 'source': source, 'metadata': {'tags': [tag]}}
        for tag, source in [('exercise', MEAN), ('check', check)]
    ]
    (tmp_path / 'toy.ipynb').write_text(json.dumps({'cells': cells, 'metadata': {}}))
    rows, said = measure(tmp_path / 'toy.ipynb')
    assert [row['caught'] for row in rows] == ([] if caught is None else [caught])
    assert words in said


def bound(source):
    "The names that a cell binds"
    for node in ast.parse(re.sub('^[!%].*', '', source, flags=re.M)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        else:
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            yield from (part.id for part in parts if isinstance(part.ctx, ast.Store))


@pytest.mark.parametrize('lesson', LESSONS, ids=lambda path: path.stem)
def test_no_later_cell_takes_the_name_of_an_exercise(lesson):
    cells = _read(lesson)['cells']
    for exercise in _find_exercises({'cells': cells}):
        for cell in cells[exercise.cell + 1 :]:
            if cell['cell_type'] == 'code' and 'answer' not in cell['metadata'].get('tags', []):
                assert exercise.name not in bound(cell['source']), cell['source']
