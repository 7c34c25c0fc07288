"""The beginning of a program for a fresh process in which ``monge`` cannot be imported."""

WITHOUT_MONGE = """
import sys
from importlib.abc import MetaPathFinder

class NoMonge(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "monge":
            raise ImportError("monge is not installed here")

sys.meta_path.insert(0, NoMonge())
try:
    import monge
except ImportError:
    pass
else:
    raise SystemExit("monge could be imported")
"""
