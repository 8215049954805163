"""Folders of Lorsas, here or on the Hugging Face hub."""

from pathlib import Path, PurePosixPath

FIRST_CHOICE = (
    "config.json",
    "lorsa.safetensors",
    "sae_weights.safetensors",
    "sae_weights.safetensors.index.json",
    "sae_weights-*-of-*.safetensors",
)
"""Files of a Lorsa that are asked of the hub, in its folder."""

SECOND_CHOICE = (
    "sae_weights.pt",
    "sae_weights.dcp/*",
    "sae_weights.dcp/.metadata",
    *(f"checkpoints/{name}.safetensors" for name in ("pruned", "final")),
    *(f"checkpoints/{name}.pt" for name in ("pruned", "final")),
    *(f"checkpoints/{name}.dcp/*" for name in ("pruned", "final")),
    *(f"checkpoints/{name}.dcp/.metadata" for name in ("pruned", "final")),
    "final.pth",
)
"""Asked for where the first choice holds a configuration but no weights."""


def local_folder(
    path: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder itself, or one downloaded from the hub.

    Args:
        path: a folder, or an id on the hub: `user/repo`, `user/repo/subfolder` or
            `user/repo:subfolder`.
        subfolder: a folder inside it.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept. None: the hub's own cache.
        token: for private repositories. None: that of the login.
        force_download: download again what is in the cache.
        local_files_only: use the cache, and no network.

    Raises:
        FileNotFoundError: if there is no such folder, here or on the hub.
    """
    if Path(path).is_file():
        raise FileNotFoundError(f"{path} is a file: give the folder that holds it")
    if Path(path).exists():
        return Path(path) / _inside(subfolder or "")
    repo, folder = hub_id(path)
    folder = str(PurePosixPath(folder, _inside(subfolder or "")))
    prefix = "" if folder == "." else f"{folder}/"
    from huggingface_hub import snapshot_download

    def download(names: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[prefix + name for name in names],
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            ),
            prefix,
        )

    try:
        found = download(FIRST_CHOICE)
        if (found / "config.json").is_file() and not list(found.glob("*.safetensors")):
            found = download(SECOND_CHOICE)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path} is no folder here, and could not be loaded from the Hugging Face hub: {error}"
        ) from error
    return found


def hub_id(path: str | Path) -> tuple[str, str]:
    """Repository and folder of an id: `user/repo`, `user/repo/folder` or `user/repo:folder`.

    Raises:
        FileNotFoundError: if it is none of these.
    """
    text = str(path)
    repo, colon, folder = text.partition(":")
    parts = repo.split("/")
    if not colon:
        parts, folder = parts[:2], "/".join(parts[2:])
    outside = {"", ".", ".."} & {*parts, *(folder.split("/") if folder or colon else ())}
    if len(parts) != 2 or outside or text.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{path} is no folder here, and no hub id either (user/repo, user/repo/subfolder or "
            "user/repo:subfolder)"
        )
    return "/".join(parts), folder


def _inside(subfolder: str) -> str:
    if PurePosixPath(subfolder).is_absolute() or ".." in subfolder.replace("\\", "/").split("/"):
        raise FileNotFoundError(f"subfolder = {subfolder!r} leads out of the folder")
    return subfolder
