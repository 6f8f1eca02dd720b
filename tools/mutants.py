"""Measure how good the exercises are: how many mistakes do their checks catch?

Each lesson runs once. At each of its exercises the solution is replaced, in a process of its own,
by the stub that learners begin with and by mutants: the solution with one small change. A mutant
that fails a check is caught. Without arguments, nbs/results/exercises.csv is made anew.
"""

import argparse
import ast
import copy
import difflib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from transformers_tut.files import make_study
from transformers_tut.workbook import (
    _checks,
    _find_exercises,
    _functions,
    _make_stub,
    _make_workbook,
    _parts,
    _plain,
    _read,
)

NBS = Path(__file__).resolve().parents[1] / 'nbs'
MOST = 10  # mutants of one exercise, spread evenly over all there are
LONGEST = 60  # seconds for the checks of one mutant; what takes longer hangs, and is caught

MODULES = ('torch', 'F', 'nn', 'math', 'np')
OTHER = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def other_operator(node):
    for field in ('op', 'ops'):
        op = getattr(node, field, None)
        first = op[0] if isinstance(op, list) else op
        if type(first) in OTHER:
            new = OTHER[type(first)]()
            return {field: [new, *op[1:]] if isinstance(op, list) else new}


def other_value(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return {'value': not node.value if isinstance(node.value, bool) else node.value + 1}


def without(node):
    "What is left of a sign, a condition, a call or a statement"
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        return node.operand
    if isinstance(node, ast.IfExp):
        return node.orelse
    if isinstance(node, ast.Call):
        owner = getattr(node.func, 'value', None)
        if owner is None or getattr(owner, 'id', '') in MODULES:  # f(x), torch.f(x)
            return node.args[0] if node.args else None
        return owner  # of x.f()
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)):
        return ast.Pass()


def swapped(node):
    method = isinstance(node, ast.Call) and getattr(node.func, 'attr', '')
    if isinstance(node, ast.Call) and len(node.args) == 2 and method != 'transpose':
        return {'args': node.args[::-1]}
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.MatMult, ast.Sub, ast.Div)):
        return {'left': node.right, 'right': node.left}


def half(node):
    if isinstance(node, ast.BinOp):
        return node.left


def fewer(node):
    if isinstance(node, ast.Call) and node.keywords:
        return {'keywords': node.keywords[:-1]}


CHANGES = [other_operator, other_value, without, swapped, half, fewer]


class Change(ast.NodeTransformer):
    "Change one node, counted in the order of a walk"

    def __init__(self, which, how):
        self.left, self.how, self.done = which, how, False

    def visit(self, node):
        if isinstance(node, (ast.Raise, ast.arguments)):  # a message, a default
            return node
        new = None if self.done else self.how(node)
        if new is not None:
            if self.left == 0:
                self.done = True
                if isinstance(new, dict):
                    for field, value in new.items():
                        setattr(node, field, value)
                    return node
                return ast.copy_location(new, node)
            self.left -= 1
        return self.generic_visit(node)


def mutants(exercise):
    "All sources of the exercise with one small change, each once"
    found = {}
    for part, function in enumerate(_functions(exercise)):
        for how in CHANGES:
            which = 0
            while True:
                changed = copy.deepcopy(function)
                change, own = Change(which, how), _parts(changed)[1]
                changed.body[-len(own) :] = [change.visit(statement) for statement in own]
                if not change.done:
                    break
                which += 1
                found.setdefault(replaced(exercise, part, changed))
    found.pop(replaced(exercise, 0, _functions(exercise)[0]), None)
    return list(found)


def replaced(exercise, part, function):
    "The source of the exercise with another function in place of its `part`-th"
    tree = ast.parse(exercise.source)
    target = _functions(exercise)[part]
    for node in ast.walk(tree):
        same = getattr(node, 'name', None), getattr(node, 'lineno', 0)
        if same == (target.name, target.lineno):
            node.body = function.body
    return ast.unparse(ast.fix_missing_locations(tree))


def spread(sources):
    "At most MOST of them, evenly"
    step = max(1, len(sources) / MOST)
    return [sources[int(i * step)] for i in range(min(MOST, len(sources)))]


def fails(shell, sources):
    "Whether one of the cells fails or hangs, in a process of its own"
    child = os.fork()
    if child == 0:
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        signal.alarm(LONGEST)
        os._exit(any(not shell.run_cell(source).success for source in sources))
    return os.waitpid(child, 0)[1] != 0


def measure(path):
    "One row for each exercise of a lesson; its workbook runs as by a learner who writes nothing"
    lesson = _read(path)
    exercises = {lesson['cells'][e.cell]['id']: e for e in _find_exercises(lesson)}
    named = _checks(lesson, list(exercises.values()))
    shell, rows = InteractiveShell.instance(), []
    for cell in _make_workbook(lesson)['cells']:
        behind = cell['cell_type'] != 'code' or cell['source'].startswith(('%%check', '%%solution'))
        if len(rows) == len(exercises) and not behind:
            break
        if cell['id'] in exercises:
            e = exercises[cell['id']]
            places = [i for i, name in named.items() if name.startswith(f'{e.name} ')]
            checks = [_plain(lesson['cells'][i]['source']) for i in places]
            if fails(shell, [e.source, *checks]) or not fails(shell, [_make_stub(e), *checks]):
                sys.exit(f'{path.name}: {e.name} must fail as a stub, and pass as it stands')
            tried = spread(mutants(e))
            alive = [m for m in tried if not fails(shell, [m, *checks])]
            counts = {'mutants': len(tried), 'caught': len(tried) - len(alive)}
            rows.append({'lesson': path.stem, 'exercise': e.name} | counts)
            for m in alive:
                print(f'{path.stem}: {e.name}: nobody notices\n{difference(e, m)}', flush=True)
        if cell['cell_type'] == 'code':
            with capture_output() as said:
                success = shell.run_cell(cell['source']).success
            if not success or 'restart the kernel' in said.stdout:
                sys.exit(
                    f'{path.name}: a cell of its workbook fails\n{cell["source"]}\n{said.stdout}'
                )
    return rows


def difference(exercise, mutant):
    "The lines that a mutant changes"
    plain = ast.unparse(ast.parse(exercise.source)).splitlines()
    lines = difflib.unified_diff(plain, mutant.splitlines(), lineterm='', n=0)
    return '\n'.join(line for line in lines if line[0] in '+-' and line[:3] not in ('+++', '---'))


def measure_apart(path):
    "The same, in a process of its own"
    command = [sys.executable, __file__, path]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{')]


def main():
    about, details = __doc__.split('\n\n', 1)
    parser = argparse.ArgumentParser(description=about, epilog=details)
    parser.add_argument('lesson', nargs='?', help='a notebook; print its rows instead')
    lesson = parser.parse_args().lesson
    path = lesson and Path(lesson).resolve()
    # threads do not survive a fork
    os.environ |= {'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1', 'TUT_STUDIES': 'anew'}
    os.chdir(NBS)
    if path:
        for row in measure(path):
            print(json.dumps(row))
        return
    lessons = sorted(NBS.glob('[01]*.ipynb'))
    with ThreadPoolExecutor(2) as pool:
        make_study('exercises', lambda: sum(pool.map(measure_apart, lessons), []))


if __name__ == '__main__':
    main()
