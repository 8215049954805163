"""What circuit-tracer's page asks of a graph's JSON: checked before anything is written."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

NODE_KEYS: dict[str, tuple[type, ...]] = {
    "node_id": (str,),
    "feature": (int,),
    "layer": (str,),
    "ctx_idx": (int,),
    "feature_type": (str,),
    "token_prob": (float, int),
    "is_target_logit": (bool,),
    "run_idx": (int,),
    "reverse_ctx_idx": (int,),
    "jsNodeId": (str,),
    "clerp": (str,),
    "influence": (float, int, type(None)),
    "activation": (float, int, type(None)),
}
"""Keys of a node, and what may stand there."""

TRACING_NAMES = {"pair_wise": 2, "top_q_marginal": 1, "top_k_marginal": 1}
"""What stands in a head's `qk_tracing_results`: how many nodes each entry names."""

LOGIT_LABEL = re.compile(r'Output ".*" \(p=\d+\.\d+\)', re.DOTALL)
"""Their page splits a logit's label at `(p=`, and fails on others."""


def check_graph(values: Mapping[str, Any]) -> None:
    """Refuse a graph that their page cannot draw.

    Raises:
        ValueError: naming the node or link and what is wrong.
    """
    metadata, nodes, links = values["metadata"], values["nodes"], values["links"]
    check_slug(metadata["slug"])
    n_tokens = len(metadata["prompt_tokens"])
    times = Counter(node["node_id"] for node in nodes)
    for node in nodes:
        _check_node(node, n_tokens)
        if times[node["node_id"]] > 1:
            raise ValueError(f"node {node['node_id']} is there {times[node['node_id']]} times")
    known = set(times)
    _check_names(values["qParams"], known)
    for link in links:
        for end in ("source", "target"):
            if link[end] not in known:
                raise ValueError(f"a link's {end} {link[end]} is no node of the graph")
        _check_number(link["weight"], f"the weight of {link['source']} to {link['target']}")
    for node in nodes:
        if "qk_tracing_results" in node:
            _check_tracing(node["node_id"], node["qk_tracing_results"])


def check_slug(slug: str) -> None:
    """Refuse a graph's name that is no plain name of a file.

    Raises:
        ValueError: if it holds anything else than letters, digits, `-` and `_`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", slug):
        raise ValueError(f"slug = {slug!r}: letters, digits, - and _ only")


def slug_of(name: str) -> str:
    """A graph's name made of any text, as `Qwen3-1-7B` of `Qwen3-1.7B`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "graph"


def check_features(values: Mapping[str, Any]) -> None:
    """Refuse a head's file that their page cannot show.

    Raises:
        ValueError: naming the example and what is wrong.
    """
    for quantile in values["examples_quantiles"]:
        for number, example in enumerate(quantile["examples"]):
            where = f"example {number} of feature {values['index']}"
            n_tokens = len(example["tokens"])
            if len(example["tokens_acts_list"]) != n_tokens:
                raise ValueError(
                    f"{where} has {n_tokens} tokens, but {len(example['tokens_acts_list'])} values"
                )
            if not 0 <= example["train_token_ind"] < n_tokens:
                raise ValueError(
                    f"{where} marks token {example['train_token_ind']} of {n_tokens}, from 0"
                )
            for value in example["tokens_acts_list"]:
                _check_number(value, where)


def _check_node(node: Mapping[str, Any], n_tokens: int) -> None:
    name = node["node_id"]
    for key, kinds in NODE_KEYS.items():
        value = node[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"node {name}: {key} = {value!r} is no {kinds[0].__name__}")
        if isinstance(value, float):
            _check_number(value, f"node {name}: {key}")
    if not 0 <= node["ctx_idx"] < n_tokens:
        raise ValueError(f"node {name} is at position {node['ctx_idx']} of {n_tokens}, from 0")
    if node["feature_type"] == "logit" and not LOGIT_LABEL.fullmatch(node["clerp"]):
        raise ValueError(f'node {name}: a logit is labelled Output "..." (p=0.123)')
    if node["influence"] is not None and not 0 <= node["influence"] <= 1:
        raise ValueError(f"node {name}: influence = {node['influence']} is a share, 0 to 1")


def _check_tracing(name: str, traced: Mapping[str, Any]) -> None:
    """`{pair_wise, top_q_marginal, top_k_marginal}`: names, then a number, in each entry."""
    for key, n_names in TRACING_NAMES.items():
        for entry in traced[key]:
            *names, value = entry
            if len(names) != n_names or not all(isinstance(one, str) for one in names):
                raise ValueError(
                    f"node {name}: {key} holds {entry!r}, not {n_names} names and a number"
                )
            _check_number(value, f"node {name}: {key} of {' and '.join(names)}")


def _check_names(shown: Mapping[str, Any], known: set[str]) -> None:
    groups: Sequence[Sequence[str]] = shown["supernodes"]
    members = (name for group in groups for name in group[1:])
    for name in (*shown["pinnedIds"], *members):
        if name not in known:
            raise ValueError(f"{name} is pinned or grouped, but is no node of the graph")


def _check_number(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
