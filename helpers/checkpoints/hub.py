"""Fetch a published checkpoint: one pinned revision, weights and tokenizer only, never code."""

from __future__ import annotations

import json
import os
import re
from datetime import date
from pathlib import Path
from typing import Literal

from .. import catalog
from ..errors import HelpersError, unknown
from ..native.lora import folder_names

Source = Literal["huggingface", "modelscope"]

SMALL_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
SMALL_FILES += ["tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "*.tiktoken", "adapter_config.json"]
SMALL_FILES += ["ice_text.model", "rwkv_vocab_v20230424.txt", "chat_template.jinja"]
SAFE_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
OLD_WEIGHTS = ["*.bin", "*.bin.index.json"]
"""Pickles of tensors, taken only where a repository has no safetensors; they are read with weights_only."""

RECEIPT = "fetched.json"


def cache_folder() -> Path:
    """Return the folder of downloads and conversions: ``$LLM_DEPLOY_CACHE``, else ``~/.cache/llm-deploy-action``."""
    return Path(os.environ.get("LLM_DEPLOY_CACHE") or Path.home() / ".cache" / "llm-deploy-action").expanduser()


def fetch(model: str, source: Source = "huggingface", revision: str | None = None) -> Path:
    """Download a model's published checkpoint, or finish a download that was interrupted.

    Args:
        model: catalogue id, e.g. ``"chatglm3-6b"``.
        source: the hub to ask.
        revision: commit (Hugging Face) or tag or commit (ModelScope); the catalogue's pin when None. Where the
            catalogue has none, Hugging Face is asked once for its newest commit, which then stays this folder's pin.
            Of a model published as several adapters, the last one's.

    Returns:
        The folder of the original checkpoint, below ``cache_folder()``. A complete one is returned at once. Of a
        model published as LoRA it holds the adapters, as ``lora/`` or as ``lora-1/`` and ``lora-2/``, and no base.

    Raises:
        HelpersError: unknown model or hub, no such repository or revision, no pin, the hub cannot be reached, or the
            disk is full.
    """
    row = catalog.model(model)
    if source not in ("huggingface", "modelscope"):
        raise unknown("hub", source, ["huggingface", "modelscope"])
    repository = getattr(row.repositories, source)
    steps = row.adapters.steps if row.adapters else ()
    if repository is None or (steps and source != "huggingface"):
        what = "repositories of its adapters" if steps else "repository of it"
        raise HelpersError(
            f"cannot fetch {model} from {source}", f"the catalogue knows no {what} there", "try the other hub"
        )
    folder = cache_folder() / "hub" / source / model
    for step, name in zip(steps, folder_names(len(steps)), strict=True):
        asked = revision if step is steps[-1] else None
        _fetch(model, source, step.repository, asked, step.revision, folder / name)
    if not steps:
        _fetch(model, source, repository, revision, row.revision if source == "huggingface" else None, folder, row.file)
    return folder


def fetched(model: str) -> Path | None:
    """Return the folder of a complete earlier download, Hugging Face's before ModelScope's; None if there is none."""
    folders = [cache_folder() / "hub" / source / model for source in ("huggingface", "modelscope")]
    return next((folder for folder in folders if _complete(folder, None)), None)


def _fetch(
    model: str,
    source: Source,
    repository: str,
    asked: str | None,
    pin: str | None,
    folder: Path,
    file: str | None = None,
) -> None:
    """Download one repository at the revision asked for, else at its pin; a complete folder is left as it is.

    Of the weights, only ``file`` where a repository has several models.
    """
    if _complete(folder, asked):
        return
    from httpx import HTTPError

    try:
        download = _from_huggingface if source == "huggingface" else _from_modelscope
        revision = download(repository, asked or pin, folder, file)
    except HelpersError:
        raise
    except (OSError, HTTPError) as error:  # the disk's and huggingface_hub's own; the network's as httpx raises them
        raise _explain(model, source, repository, error) from None
    names = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    receipt = {"repository": repository, "revision": revision, "date": date.today().isoformat(), "files": names}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1))


def _complete(folder: Path, revision: str | None) -> bool:
    """Tell whether an earlier fetch ended well, every file still has its size, and it is the revision asked for."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
        sizes_hold = all((folder / name).stat().st_size == size for name, size in receipt["files"].items())
    except (OSError, ValueError):
        return False
    return sizes_hold and revision in (None, receipt["revision"])


def _from_huggingface(repository: str, revision: str | None, folder: Path, file: str | None) -> str:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repository, revision=revision)  # a name such as "main" becomes its commit here
    names = [file.rfilename for file in info.siblings or []]
    weights = SAFE_WEIGHTS if any(name.endswith(".safetensors") for name in names) else OLD_WEIGHTS
    weights = [file] if file else weights
    snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=[*SMALL_FILES, *weights])
    return info.sha


def _from_modelscope(repository: str, revision: str | None, folder: Path, file: str | None) -> str:
    """ModelScope names no commit for a branch, so a branch is no pin: a tag or a commit has to be given."""
    if revision is None or revision in ("master", "main"):
        raise HelpersError(
            f"cannot fetch {repository} from modelscope",
            f"{revision or 'no revision'} is no fixed point in time",
            f"pass revision= a tag or commit listed at https://modelscope.cn/models/{repository}/files",
        )
    from modelscope import snapshot_download

    patterns = [*SMALL_FILES, *([file] if file else [*SAFE_WEIGHTS, *OLD_WEIGHTS])]
    snapshot_download(repository, revision=revision, local_dir=str(folder), allow_patterns=patterns)
    return revision


def _explain(model: str, source: Source, repository: str, error: Exception) -> HelpersError:
    """Turn what the hub's library raised into cause and remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"cannot fetch {model} from {source}"
    if isinstance(error, GatedRepoError):
        fix = f"accept its terms at https://huggingface.co/{repository}, then log in: hf auth login"
        return HelpersError(what, "its publisher asks readers to accept terms first", fix)
    if isinstance(error, RevisionNotFoundError):
        return HelpersError(what, f"{repository} has no such revision", "leave revision out, or copy a commit's hash")
    if isinstance(error, RepositoryNotFoundError):
        return HelpersError(what, f"there is no public repository {repository}", "try the other hub")
    if getattr(error, "errno", None) == 28:
        return HelpersError(what, "the disk is full", "set LLM_DEPLOY_CACHE to a folder on a larger disk and run again")
    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:120]
    row, elsewhere = catalog.model(model), ""
    if source == "huggingface" and row.repositories.modelscope and not row.adapters:
        elsewhere = (
            f"`python -m helpers fetch {model} --from modelscope --revision TAG`, which weights='hub' then takes, "
        )
    return HelpersError(
        what,
        f"the hub cannot be reached ({reason})",
        f"set HF_ENDPOINT to a mirror such as https://hf-mirror.com, {elsewhere}or pass the folder of a copy that you "
        "have: load(model, weights='path/to/folder')",
    )
