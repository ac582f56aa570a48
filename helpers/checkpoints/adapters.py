"""Models published as LoRA (Chinese-LLaMA-Alpaca): the reader brings the base, the adapters are fetched or brought too.

    DIR/base/                   LLaMA-7B, under Meta's own terms
    DIR/lora/                   one adapter; of Plus and Pro instead
    DIR/lora-1/  DIR/lora-2/    two, merged in this order

The adapters may be left out. A folder without base/ is taken for a copy that someone merged before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .. import catalog
from ..errors import HelpersError
from ..native.convert import read_original
from ..native.lora import base_and_adapters, folder_names
from .hub import fetch


def base_is_missing(row: catalog.Model) -> HelpersError:
    """Build the error for ``weights="hub"``: no hub has the base, and this is how to bring it."""
    return HelpersError(
        f"cannot load {row.id} from a hub",
        f"only its adapters are published; the base is {row.adapters.base}, under terms of its own",
        f"put the base into DIR/base and pass weights='DIR'; {_places(row)} are fetched if you do not put them there",
    )


def published_parts(row: catalog.Model, folder: Path) -> tuple[Path, list[Path]]:
    """Return base and adapters of a reader's folder, having checked what can be known of them.

    Returns:
        The base and the adapters to merge into it, in this order, fetched where there are none; of a merged copy,
        itself and no adapters.

    Raises:
        HelpersError: the base is another model, there are more or fewer adapters than the model has, one is known by
            its checksum to be another one, or fetching failed. Files that no checksum is known of, such as one stored
            anew as safetensors, are taken as they are.
    """
    base, found = base_and_adapters(folder)
    merged = base == folder
    _check_base(row, base, merged)
    if merged:
        return base, []
    steps = row.adapters.steps
    if not found:
        found = [fetch(row.id) / name for name in folder_names(len(steps))]
    what = f"cannot merge {row.id}"
    if len(found) != len(steps):
        why = f"{folder.name} holds {len(found)} of {len(steps)} adapters"
        raise HelpersError(what, why, f"put in {_places(row)}, or leave all of them out to have them fetched")
    others = [step for other in catalog.models().values() if other.adapters for step in other.adapters.steps]
    known = {step.sha256: step.repository for step in others if step.sha256}
    for place, step in zip(found, steps, strict=True):
        file = place / "adapter_model.bin"
        if file.exists() and (repository := known.get(_sha256(file), step.repository)) != step.repository:
            why = f"by its SHA256, {place.name} holds {repository} and not {step.repository}"
            raise HelpersError(what, why, f"put in {_places(row)}")
    return base, found


def _check_base(row: catalog.Model, base: Path, merged: bool) -> None:
    """Refuse what config.json shows to be another model: Llama 2's tensors have the shapes of LLaMA's.

    A base of another size is left to the merge, which finds it by the shapes.
    """
    config = read_original(base)[0]
    context, tokens = config.get("max_position_embeddings", config.get("max_sequence_length")), config.get("vocab_size")
    if config.get("hidden_size") != row.shape.hidden_size:
        return
    if merged and tokens != row.shape.vocab_size:
        why = f"it has {tokens} tokens and {row.name} has {row.shape.vocab_size}, so this is not a merged model"
    elif context != row.context:
        why = f"its context is {context} tokens, and that of {row.adapters.base}, is {row.context}"
    else:
        return
    fix = f"put the base, {row.adapters.base}, into DIR/base and pass weights='DIR'"
    raise HelpersError(f"cannot make {row.id} of {base}", why, fix)


def _places(row: catalog.Model) -> str:
    """Say which adapter belongs into which folder, e.g. ``a/b (DIR/lora-1) and a/c (DIR/lora-2)``."""
    places = zip(row.adapters.steps, folder_names(len(row.adapters.steps)), strict=True)
    return " and ".join(f"{step.repository} (DIR/{name})" for step, name in places)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
