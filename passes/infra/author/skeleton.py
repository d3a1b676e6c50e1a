"""The files of a new pass, as templates: a pattern that already matches, and what to change in it."""

from __future__ import annotations

from string import Template

DOC = """\
Drop a Relu of a Relu.

Before:
    g (float[B,8] x) => (float[B,8] y) {
        inner = Relu (x)
        y = Relu (inner)
    }
After:
    g (float[B,8] x) => (float[B,8] y) {
        y = Relu (x)
    }
"""

PASS = Template('''\
"""Relu(Relu(x))  ->  Relu(x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from vacc_opt.passes.api import Capture, Kind, Match, Pattern, PatternPass, Reason, Rewriter, Value, op, register


@register
@dataclass(frozen=True)
class $class_name(PatternPass):
    """$doc
    """

    name: ClassVar[str] = "$name"
    kind: ClassVar[Kind] = Kind.$kind

    def pattern(self, x: Capture) -> Pattern:
        """Two in a row; a parameter captures the value that stands in its place."""
        return op.Relu(op.Relu(x))

    def check(self, m: Match) -> Iterator[Reason]:
        """Each reason declines the match and is printed; none means go on."""
        if not m.x.type.dtype.is_float:
            yield m.reason("x is {x}, floats are expected", x=m.x.type)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """The value that takes the place of the outer one; what nobody reads any more goes by itself."""
        return rw.op.Relu(m.x)
''')

_CASES = """

def test_three_in_a_row_become_one() -> None:
    assert_rewrites(
        $class_name(expect=2),
        before="g (float[B,8] x) => (float[B,8] y) { a = Relu (x) b = Relu (a) y = Relu (b) }",
        after="g (float[B,8] x) => (float[B,8] y) { y = Relu (x) }",
    )


def test_integers_are_left_with_a_reason() -> None:
    assert_no_match(
        $class_name(),
        "g (int32[B,8] x) => (int32[B,8] y) { a = Relu (x) y = Relu (a) }",
        reason="x is int32[B,8], floats are expected",
    )
"""

TESTING = "from vacc_opt.passes.infra.testing import assert_no_match, assert_rewrites"
# the examples in the docstrings of our own passes are run by a test of all of them
PASS_TEST = Template(
    '''\
"""$name: a Relu of a Relu is one Relu."""

from __future__ import annotations

$imports
'''
    + _CASES
)

PLUGIN_TEST = Template(
    '''\
"""$name: a Relu of a Relu is one Relu."""

from __future__ import annotations

from vacc_opt.passes.infra.testing import assert_examples, assert_no_match, assert_rewrites

from $module import $class_name


def test_the_example_in_its_docstring_holds() -> None:
    assert_examples($class_name)
'''
    + _CASES
)

LIT_TEST = Template("""\
# RUN: vacc-opt %s -p $name 2>&1 | filecheck %s

# CHECK: $name fused 1 of 1 match
# CHECK: y = Relu (x)

g (float[B,8] x) => (float[B,8] y) {
    inner = Relu (x)
    y = Relu (inner)
}
""")

PYPROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "Passes for vacc-opt"
requires-python = ">=3.11"
dependencies = ["vacc-opt"]

# vacc-opt imports the module, which registers its passes
[project.entry-points."vacc_opt.passes"]
$name = "$package.$file"

[tool.setuptools]
packages = ["$package"]

[tool.setuptools.package-data]
$package = ["py.typed"]

[tool.pytest.ini_options]
pythonpath = ["."]
testpaths = ["tests"]
""")
