# What the names that __init__.py imports late are, for type checkers and completion.

from hcsmoe_core import adapters as adapters
from hcsmoe_core._version import __version__ as __version__
from hcsmoe_core.checkpoint import load_merged as load_merged
from hcsmoe_core.checkpoint import load_model as load_model
from hcsmoe_core.checkpoint import save_merged as save_merged
from hcsmoe_core.clustering import cut as cut
from hcsmoe_core.clustering import linkage as linkage
from hcsmoe_core.collect import capture as capture
from hcsmoe_core.families import find_moe_layers as find_moe_layers
from hcsmoe_core.merging import apply_plan as apply_plan
from hcsmoe_core.merging import restore as restore
from hcsmoe_core.methods import make_plan as make_plan
from hcsmoe_core.plan import Plan as Plan
from hcsmoe_core.plan import load_plan as load_plan
from hcsmoe_core.score.evaluation import evaluate as evaluate
from hcsmoe_core.similarity import distances as distances
from hcsmoe_core.statistics import Statistics as Statistics
from hcsmoe_core.statistics import load_statistics as load_statistics
from hcsmoe_core.steps import METHODS as METHODS
from hcsmoe_core.studies.pipeline import shrink as shrink
from hcsmoe_core.text.calibration import calibration_tokens as calibration_tokens
from hcsmoe_core.ui import plot as plot
