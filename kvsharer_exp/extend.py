"""The one stable import for packages that add spaces, samplers, scorers, actions, tasks or models.

Every name here stays the same from version to version, wherever it lives inside the package:

>>> from kvsharer_exp.extend import SharingMap, Space, or_first_pair

docs/api.md documents each name; tests/plugin_example/ is a package that uses them.
"""

from kvsharer_exp.data.passages import Passage, TextParts
from kvsharer_exp.data.split import split_texts
from kvsharer_exp.data.windows import token_windows
from kvsharer_exp.model.actions.base import ActionRunner
from kvsharer_exp.model.actions.stand_in import StandInRunner
from kvsharer_exp.model.moments import Moments
from kvsharer_exp.model.sharing.architectures import attention_layers
from kvsharer_exp.model.spec import ModelSpec
from kvsharer_exp.search.fitness import Fitness
from kvsharer_exp.search.spaces.base import (
    SearchSpace,
    Space,
    SpaceSetting,
    from_pairs,
    or_first_pair,
    refuse_a_single_map,
)
from kvsharer_exp.search.strategies.map_sampler import MapSampler, Strategy
from kvsharer_exp.search.strategies.memory import Memory
from kvsharer_exp.values.actions.base import Action
from kvsharer_exp.values.errors import InputError, at_least
from kvsharer_exp.values.footprint import Footprint
from kvsharer_exp.values.plan import KVPlan
from kvsharer_exp.values.ranking import DissimilarityRanking, LayerPair
from kvsharer_exp.values.scores import CandidateScores
from kvsharer_exp.values.sharing_map import SharingMap
from kvsharer_exp.values.trial import TrialResult

__all__ = [
    "Action",
    "ActionRunner",
    "CandidateScores",
    "DissimilarityRanking",
    "Fitness",
    "Footprint",
    "InputError",
    "KVPlan",
    "LayerPair",
    "MapSampler",
    "Memory",
    "ModelSpec",
    "Moments",
    "Passage",
    "SearchSpace",
    "SharingMap",
    "Space",
    "SpaceSetting",
    "StandInRunner",
    "Strategy",
    "TextParts",
    "TrialResult",
    "at_least",
    "attention_layers",
    "from_pairs",
    "or_first_pair",
    "refuse_a_single_map",
    "split_texts",
    "token_windows",
]
