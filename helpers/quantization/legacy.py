"""Folders that AutoGPTQ wrote, brought to the form that today's transformers, GPTQModel and vLLM read.

    read the settings  ->  find and check the weights  ->  link them under their new names  ->  write config.json

A matrix [out, in] lies in such a folder as four tensors: ``qweight`` [in * bits / 32, out], ``qzeros``
[groups, out * bits / 32], ``scales`` [groups, out] and ``g_idx`` [in], the group of each input.

Source: AutoGPTQ 0.7.1, ``modeling/_base.py`` and ``nn_modules/qlinear`` (https://github.com/AutoGPTQ/AutoGPTQ).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import partial as bind
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError
from ..native.convert import Conversion, has_family, open_shard, read_config
from ..native.rules import Rule, drop

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ["bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential"]
"""Settings that say something about the tensors; the others tell of the maker's machine or of a kernel."""

KINDS = ("qweight", "qzeros", "scales", "g_idx")
SUFFIXES = (".safetensors", ".bin", ".pt")
SERIES = Path(__file__).parents[2]


def upgrade(folder: Path | str, target: Path | str | None = None) -> Path:
    """Bring a folder that AutoGPTQ wrote to the form that transformers 5, GPTQModel and vLLM read.

    transformers and GPTQModel take all of them; vLLM those that are symmetric (``sym``) and of 4 or 8 bits.

    The weights are called model.safetensors (linked where the disk allows it, so that no byte is copied; .bin and .pt
    are rewritten), config.json holds the settings of quantize_config.json, and both name ``checkpoint_format: gptq``.
    An original architecture (``qwen``, ``baichuan``, ...) becomes its native class as well, shard by shard.

    Args:
        folder: what AutoGPTQ, or a publisher with it, left. It stays as it is, unless it is the target.
        target: folder to make, ``<folder>-upgraded`` when None; ``folder`` itself to change it in place.

    Returns:
        The target.

    Raises:
        HelpersError: it is no such folder, it is made for one kernel only (Marlin), tensors and settings do not fit
            each other, or the target exists. Nothing is changed then.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name to put a word behind
    target = Path(target) if target is not None else folder.with_name(folder.name + "-upgraded")
    in_place = target.resolve() == folder.resolve()
    if target.exists() and not in_place:
        raise HelpersError(f"will not overwrite {target.name}", "it exists", "name a folder that does not exist yet")
    if in_place and _before(folder).exists():
        what, why = f"cannot upgrade {folder.name} in place", f"{_before(folder).name} of a stopped run lies beside it"
        raise HelpersError(what, why, "keep the whole one of the two, under its name")
    config = read_config(folder)
    settings = _settings(folder, config)
    files = _weights(folder, settings)
    _check_tensors(files, settings["bits"])
    converts = has_family(config) and config["model_type"] != "llama"  # a Llama's names are today's

    renamed, native = (target.with_name(f"{target.name}.{step}.partial") for step in ("renamed", "native"))
    try:
        for rest in (renamed, native):
            shutil.rmtree(rest, ignore_errors=True)  # of a run that was killed
        _rename(folder, files, renamed)
        _write_settings(renamed, settings)
        if converts:
            _Packed(renamed, settings["bits"]).write(native)
            _write_settings(native, settings)
        made = native if converts else renamed
        _replace(folder, made) if in_place else made.rename(target)
    finally:
        for rest in (renamed, native):
            shutil.rmtree(rest, ignore_errors=True)
    return target


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Add to a config.json of transformers 5 what 4 looks for: ``rope_theta`` and ``rope_scaling``.

    transformers 4 does not know ``rope_parameters`` and takes its default of 10,000 instead of the base in there,
    without a word (transformers' MIGRATION_GUIDE_V5.md tells of the change).
    """
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    return config if theta is None else config | {"rope_theta": theta, "rope_scaling": scaling}


def run_in_venv(code: str, offline: bool = True) -> str:
    """Run Python in .venv, the environment of the other notebooks, and return what it prints.

    Args:
        code: what to run.
        offline: ask no hub; False for code that downloads.

    Raises:
        HelpersError: there is no .venv, or the code fails; its last line is told.
    """
    python = SERIES / ".venv" / "bin" / "python"
    if not python.exists():
        raise HelpersError("cannot run this in .venv", "there is no .venv beside helpers/", "run make setup first")
    settings = os.environ | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        if "HelpersError: " in lines[-1]:
            raise HelpersError(*_parts(lines[-1].partition("HelpersError: ")[2]))
        raise HelpersError("the code for .venv failed", lines[-1].rstrip("."), "run it there to see all of it")
    return done.stdout.strip()


def _parts(line: str) -> tuple[str, str, str]:
    """Cut a HelpersError's line into what, why and what to do."""
    what, _, rest = line.partition(": ")
    why, _, fix = rest.rpartition(". ")
    return what, why, fix.rstrip(".")


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read how the weights were quantised; quantize_config.json goes before what config.json says.

    Raises:
        HelpersError: nothing says so, it was another method, or the tensors are in another order.
    """
    file = folder / "quantize_config.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise HelpersError(f"cannot read {file.name}", f"it is not JSON ({error})", "download it again") from None
    else:
        found = config.get("quantization_config")
    what = f"cannot upgrade {folder.name}"
    if not isinstance(found, dict) or "bits" not in found:
        why = "neither quantize_config.json nor config.json says how it was quantised"
        raise HelpersError(what, why, "name a folder that AutoGPTQ wrote")
    method = "awq" if found.get("version") == "GEMM" else found.get("quant_method", "gptq")
    if method != "gptq":
        raise HelpersError(what, f"it was quantised by {method}", "load it as it is: AWQ folders need no upgrade")
    form = "marlin" if found.get("is_marlin_format") else found.get("checkpoint_format", "gptq")
    if form != "gptq":
        why = f"its tensors are in the form {form!r}, not AutoGPTQ's common one"
        raise HelpersError(what, why, "take the checkpoint it was made from")
    if found["bits"] not in (2, 3, 4, 8):
        raise HelpersError(what, f"its settings say {found['bits']} bits", "2, 3, 4 and 8 are what AutoGPTQ writes")
    return {"sym": True, "desc_act": False, "group_size": -1, **found}


def _weights(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Find the weight files: by the names AutoGPTQ gives, else the only one there is.

    Raises:
        HelpersError: there are none or several, or a shard is missing.
    """
    named = [settings.get("model_file_base_name"), settings.get("model_basename")]
    named += [f"gptq_model-{settings['bits']}bit-{settings['group_size']}g", "model", "pytorch_model"]
    for stem in filter(None, named):
        for suffix in SUFFIXES:
            single = folder / f"{Path(stem).name}{suffix}"
            index = single.with_name(single.name + ".index.json")
            if index.exists():
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                missing = [name for name in shards if not (folder / name).exists()]
                if missing:
                    why = f"shard {', '.join(missing)} is missing"
                    raise HelpersError(f"{folder.name} is incomplete", why, "download it again")
                return [folder / name for name in shards]
            if single.exists():
                return [single]
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        why = f"its weights could be {', '.join(file.name for file in found)}" if found else "it holds no weight file"
        raise HelpersError(f"cannot upgrade {folder.name}", why, "keep one checkpoint in the folder, and all of it")
    return found


def _check_tensors(files: list[Path], bits: int) -> None:
    """Refuse files without quantised layers, and layers of other bits than the settings say; reads headers only."""
    layers = 0
    for file in files:
        tensors = open_shard(file)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            layers += 1
            index = tensors.get(name.removesuffix("qweight") + "g_idx")
            held = index is not None and tensors[name].shape[0] * 32 / index.shape[0]
            if held and held != bits:
                why = f"{name} has {held:g} bits a weight, quantize_config.json says {bits}"
                raise HelpersError("settings and tensors do not fit", why, "take both from the same place")
    if not layers:
        why = f"no tensor in {files[0].name} is called *.qweight"
        raise HelpersError("these are no weights of AutoGPTQ", why, "name the folder that holds the quantised weights")


def _rename(folder: Path, files: list[Path], partial: Path) -> None:
    """Make ``partial``: the weights under transformers' names, an index where there are several, and the rest."""
    from safetensors.torch import save_file

    left_out = [*(file.name for file in files), *(file.name for file in folder.glob("*.index.json"))]
    shutil.copytree(folder, partial, ignore=lambda *_: left_out, copy_function=link_file)
    weight_map = {}
    for number, file in enumerate(files, start=1):
        place = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        new = partial / f"model{place}.safetensors"
        if file.suffix == ".safetensors":
            link_file(file, new)
        else:
            save_file(
                {name: tensor.clone() for name, tensor in open_shard(file).items()}, new, metadata={"format": "pt"}
            )
        weight_map |= dict.fromkeys(open_shard(file), new.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def link_file(source: Path | str, target: Path | str) -> None:
    """Link a weight file (the hub's cache holds links itself) where the disk can; copy what may be edited later."""
    if Path(source).suffix in SUFFIXES:
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into config.json, where today's libraries look, and into quantize_config.json, as before."""
    kept = {name: settings[name] for name in KEPT if name in settings}
    kept |= {"quant_method": "gptq", "checkpoint_format": "gptq"}
    config = read_config(folder) | {"quantization_config": kept}
    for name, content in (("config.json", config), ("quantize_config.json", kept)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(folder: Path, made: Path) -> None:
    """Put ``made`` in the place of ``folder``, which is there, old or new, whatever happens in between."""
    before = _before(folder)
    folder.rename(before)
    try:
        made.rename(folder)
    except BaseException:  # an interruption too
        before.rename(folder)
        raise
    shutil.rmtree(before)


def _before(folder: Path) -> Path:
    return folder.with_name(folder.name + ".before-upgrade")


class _Packed(Conversion):
    """The conversion of a quantised checkpoint: its family's table, with four rows in the place of each matrix."""

    def __init__(self, source: Path, bits: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        super().__init__(source, [], None)
        with torch.device("meta"):
            self.wanted = set(AutoModelForCausalLM.from_config(self.config).state_dict())
        spare = [
            name for file in self.files for name, tensor in open_shard(file).items() if self.is_spare(name, tensor)
        ]
        packed = [one for rule in self.rules if "{i}" in rule.source for one in packed_rules(rule, bits)]
        self.rules = [*map(drop, spare), *self.rules, *packed]

    def is_spare(self, name: str, tensor: Tensor) -> bool:
        """Tell whether it is a bias of zeros that the model does not have: AutoGPTQ gives one to every layer."""
        matches = [rule.match(name) for rule in self.rules]
        used = any(target in self.wanted for targets in matches if targets for target in targets)
        return name.endswith(".bias") and not used and not tensor.any()

    def write(self, folder: Path) -> None:
        """Write the native checkpoint, without the Python files of the original."""
        folder.mkdir()
        self.write_shards(folder, progress=False)
        self.write_rest(folder)
        self.check_complete(folder)

    def check_complete(self, folder: Path) -> None:
        """Compare names with those of an empty native model: each matrix is there, in one form or the other."""
        written = {name for file in folder.glob("*.safetensors") for name in open_shard(file)}
        packed = {name.removesuffix("qweight") + "weight" for name in written if name.endswith(".qweight")}
        missing = self.wanted - written - packed - ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
        extra = {name for name in written - self.wanted if not name.endswith(KINDS)}
        if missing or extra:
            why = f"no tensor becomes {min(missing)!r}" if missing else f"{min(extra)!r} has no place in the model"
            raise HelpersError("cannot convert this checkpoint", why, "check that config.json and weights fit")


def packed_rules(rule: Rule, bits: int) -> list[Rule]:
    """Return the rows for the tensors that stand for a matrix in GPTQ's form: what ``rule`` does to its rows.

    A row of the matrix is a column of ``qweight`` and ``scales``, which are cut without looking into a number. Of
    ``qzeros`` an integer holds 32 / bits rows: it is unpacked, cut, and packed again.
    """
    stem = rule.source.removesuffix("weight")
    made = []
    for kind, split in (
        ("qweight", bind(_columns, rule)),
        ("scales", bind(_columns, rule)),
        ("qzeros", lambda tensor: [pack_columns(part, bits) for part in _columns(rule, unpack_columns(tensor, bits))]),
        ("g_idx", lambda tensor: [tensor.clone() for _ in rule.targets]),
    ):
        targets = tuple(target.removesuffix("weight") + kind for target in rule.targets)
        made.append(Rule(stem + kind, targets, split, lambda parts: None))
    return made if rule.source.endswith(".weight") else []


def _columns(rule: Rule, tensor: Tensor) -> list[Tensor]:
    return [part.T.contiguous() for part in rule.split(tensor.T)]


def unpack_columns(packed: Tensor, bits: int) -> Tensor:
    """Take int32 [rows, n * bits / 32] apart to numbers below 2**bits, int32 [rows, n], lowest bits first.

    Raises:
        HelpersError: 3 bits, which do not fill an int32 evenly.
    """
    import torch

    if 32 % bits:
        why = f"{bits} bits do not fill 32 evenly, so that a number lies across two integers"
        raise HelpersError("cannot convert this checkpoint", why, "take one with 2, 4 or 8 bits")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def pack_columns(numbers: Tensor, bits: int) -> Tensor:
    """Put numbers below 2**bits back into int32: the inverse of ``unpack_columns``."""
    import torch

    shifts = torch.arange(0, 32, bits)
    packed = (numbers.long().unflatten(-1, (-1, 32 // bits)) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)  # the highest bit is the sign
