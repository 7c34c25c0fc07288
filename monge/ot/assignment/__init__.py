"""Balanced assignment of rows to columns at maximum score: exact, approximate and greedy."""

from monge.ot.assignment.api import assign
from monge.ot.assignment.solution import Assignment, Solution

__all__ = ["Assignment", "Solution", "assign"]
