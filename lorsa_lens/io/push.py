"""Upload Lorsas to the Hugging Face hub: a folder for each, and a model card for all."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorsa_lens.io.card import model_card
from lorsa_lens.io.hub import hub_id
from lorsa_lens.io.listing import METRICS_FILE, by_layer, list_lorsas
from lorsa_lens.io.pretrained import save_pretrained
from lorsa_lens.lorsa import Lorsa


def push_to_hub(
    lorsas: Lorsa | Sequence[Lorsa],
    repo_id: str,
    *,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload Lorsas, each in a folder named by the activation it replaces, in one commit.

    The model card lists what the repository then holds, earlier uploads included.

    Args:
        lorsas: one or several; their layers must be set.
        repo_id: `user/repo`; it is made if it is not there.
        metrics: for the card, figures by name for each folder: `{"blocks.5.attn.hook_out":
            {"fvu": 0.05}}`.
        private: whether a new repository is. None: as the account's default says.
        revision: branch to commit to; it is made if it is not there. None: main.
        commit_message: None: one that counts the Lorsas.
        token: None: that of the login.

    Raises:
        ConfigError: if a Lorsa has no layer.
        ValueError: if two Lorsas replace the same activation, a weight is not finite, or `metrics`
            names none of them; nothing is uploaded then.

    Returns:
        The address of the commit.
    """
    chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
    names = [lorsa.cfg.hook_out for lorsa in chosen]
    _check(repo_id, names, metrics or {})
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="lorsa_lens")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, lorsa in zip(names, chosen, strict=True):
            save_pretrained(lorsa, folder / name)
            if metrics and name in metrics:
                text = json.dumps(dict(metrics[name]), indent=2)
                (folder / name / METRICS_FILE).write_text(text, encoding="utf-8")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = {e.name: e for e in list_lorsas(repo_id, revision=revision, token=token)}
        entries = {**before, **{entry.name: entry for entry in list_lorsas(folder)}}
        card = model_card(repo_id, sorted(entries.values(), key=by_layer))
        (folder / "README.md").write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {len(chosen)} Lorsas",
        )
    return str(commit.commit_url)


def _check(repo_id: str, names: Sequence[str], metrics: Mapping[str, Mapping[str, float]]) -> None:
    if not names:
        raise ValueError("lorsas is empty: give at least one")
    if repo_id.count("/") != 1 or hub_id(repo_id)[1]:
        raise ValueError(f"repo_id = {repo_id!r} must be user/repo")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} Lorsas replace {name}: give one for each")
    if unknown := sorted(set(metrics) - set(names)):
        raise ValueError(f"metrics are given for {unknown}, but the Lorsas are {sorted(names)}")
