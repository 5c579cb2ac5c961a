"""How long the reader's code is, and whether there is any yet."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType
from typing import Any

from stepmoe.errors import ConfigError


def is_stub(attempt: Any) -> bool:
    """Whether every body is still what the notebook came with: a docstring and `...`."""
    return all(isinstance(s, ast.Pass) or _is_constant(s) for s in _statements(attempt))


def code_lines(attempt: Any) -> int:
    """Lines of code in the body of a function, or in the bodies of a class's methods.

    Layout does not count: blank lines, comments and docstrings are free, a statement broken over
    several lines is one, and `a; b` is two.
    """
    return sum(len(ast.unparse(statement).splitlines()) for statement in _statements(attempt))


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _statements(attempt: Any) -> list[ast.stmt]:
    """Those of a function, or of a class's own methods; without their docstrings."""
    if isinstance(attempt, FunctionType):
        return _body(attempt)
    if isinstance(attempt, type):
        methods = [value for value in vars(attempt).values() if isinstance(value, FunctionType)]
        return [statement for method in methods for statement in _body(method)]
    raise ConfigError(f"give the function or class that you wrote, not {attempt!r}")


def _body(function: FunctionType) -> list[ast.stmt]:
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        definition = None
    # Around a lambda stands another statement.
    if not isinstance(definition, ast.FunctionDef) or definition.name != function.__name__:
        raise ConfigError(
            f"the source of {function.__name__} cannot be read: write it with `def`, in a cell or "
            "a file"
        )
    documented = ast.get_docstring(definition) is not None
    return definition.body[1:] if documented else definition.body
