"""Search spaces: parameters Optuna can draw, decoded to a valid map by repair, never rejected.

One idea a file here, and a YAML in `search_spaces/`. Another package adds a space by an entry
point of the group ``kvsharer_exp.search_spaces``: name → class, called with a `SpaceSetting` and
the options of ``search_space.options``.
"""

from kvsharer_exp.search.spaces.base import SearchSpace, Space, SpaceSetting
from kvsharer_exp.search.spaces.blocks import Blocks
from kvsharer_exp.search.spaces.greedy_knobs import GreedyKnobs
from kvsharer_exp.search.spaces.layer_sources import LayerSources
from kvsharer_exp.search.spaces.random_keys import RandomKeys
from kvsharer_exp.search.spaces.ranked_pairs import RankedPairs
from kvsharer_exp.search.spaces.registry import SPACES, check_space, make_space
from kvsharer_exp.search.spaces.suffix import Suffix

__all__ = [
    "SPACES",
    "Blocks",
    "GreedyKnobs",
    "LayerSources",
    "RandomKeys",
    "RankedPairs",
    "SearchSpace",
    "Space",
    "SpaceSetting",
    "Suffix",
    "check_space",
    "make_space",
]
