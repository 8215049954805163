"""Languages with known rules, the transformers trained on them, and scores against their truth.

language, model = load_language("rules"), load_model("rules")
labels = language.sample(256, seed=0)
_, cache = model.run_with_cache(labels.tokens)
source_mass(cache["blocks.0.attn.hook_pattern"], labels, len(language.rules))
"""

from lorsa_lens.testbed.cyclic import CyclicLanguage
from lorsa_lens.testbed.labels import LabelledTokens, Language
from lorsa_lens.testbed.models import load_language, load_model, load_weights
from lorsa_lens.testbed.network import NetworkConfig, run_network
from lorsa_lens.testbed.recall import RecallLanguage
from lorsa_lens.testbed.rules import RuleLanguage
from lorsa_lens.testbed.scores import rule_accuracy, rule_cross_entropy, source_mass

__all__ = [
    "CyclicLanguage",
    "LabelledTokens",
    "Language",
    "NetworkConfig",
    "RecallLanguage",
    "RuleLanguage",
    "load_language",
    "load_model",
    "load_weights",
    "rule_accuracy",
    "rule_cross_entropy",
    "run_network",
    "source_mass",
]
