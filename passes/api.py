"""What a pass is written with, in one import: patterns, matches, the rewriter, options and the registry."""

from vacc_opt.ir import DType, Graph, Node, Value
from vacc_opt.ir.rewriter import Rewriter
from vacc_opt.passes.infra.analysis import Analysis
from vacc_opt.passes.infra.base import Kind, Outcome, Pass, Remark, where
from vacc_opt.passes.infra.options import option
from vacc_opt.passes.infra.patterns.match import Match, NotMatched, Reason
from vacc_opt.passes.infra.patterns.matcher import find
from vacc_opt.passes.infra.patterns.pattern import ANY, Pattern, absent, maybe, op, through
from vacc_opt.passes.infra.patterns.pattern_pass import Attribute, Capture, Const, Operands, PatternPass, Scalar
from vacc_opt.passes.infra.patterns.values import attribute, scalar
from vacc_opt.passes.infra.registry import register

__all__ = [
    "ANY",
    "Analysis",
    "Attribute",
    "Capture",
    "Const",
    "DType",
    "Graph",
    "Kind",
    "Match",
    "Node",
    "NotMatched",
    "Operands",
    "Outcome",
    "Pass",
    "Pattern",
    "PatternPass",
    "Reason",
    "Remark",
    "Rewriter",
    "Scalar",
    "Value",
    "absent",
    "attribute",
    "find",
    "maybe",
    "op",
    "option",
    "register",
    "scalar",
    "through",
    "where",
]
