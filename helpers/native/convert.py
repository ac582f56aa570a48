"""Convert an original checkpoint to a folder that today's transformers (and so vLLM) reads, shard by shard.

    read config.json  ->  look at every file's header  ->  plan and check the whole result  ->  write shard by shard

Nothing is written before the whole plan is known to be right. One source shard becomes one target shard, read
through a memory map, so the need for RAM is about the largest shard whatever the model's size. Work lies in
``<target>.partial`` until it is complete: an interrupted run is taken up again at the next shard.
"""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError, unknown
from .family import Family, Original
from .lora import Adapter
from .own import register

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from .rules import Rule

RECIPE = 2
"""Raised whenever the result of a conversion changes, so that cached results of older code are made anew."""

RECEIPT = "conversion.json"

LFS_POINTER = b"version https://git-lfs"
"""How the text begins that Git puts in the place of a large file (https://git-lfs.com, specification of a pointer)."""


def families() -> list[Family]:
    """Return the families; of those that share a ``model_type``, the one with a mark of its own comes first."""
    from . import baichuan, chatglm, chatglm1, internlm2, internlm3, llama, qwen, rwkv

    single = [module.FAMILY for module in (chatglm1, chatglm, baichuan, qwen, internlm2, internlm3, llama)]
    return [*single, *rwkv.FAMILIES]


def has_family(original: Original) -> bool:
    """Tell whether a config is one that is converted here; those of models born native are not."""
    return any(family.matches(original) for family in families())


def family_of(original: Original) -> Family:
    """Return the family of an original config.json.

    Raises:
        HelpersError: there is none; the valid values of ``model_type`` are listed.
    """
    for family in families():
        if family.matches(original):
            return family
    valid = sorted({family.model_type for family in families()})
    raise unknown("model_type in config.json", original.get("model_type"), valid)


def read_config(folder: Path) -> Original:
    """Read a config.json as plain JSON, never through remote code.

    Of a raw RWKV, a folder with a .pth file and none, the tensors tell the sizes.
    """
    from . import rwkv

    file = Path(folder) / "config.json"
    if not file.exists() and (original := rwkv.describe(Path(folder))):
        return original
    try:
        original = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HelpersError(f"no checkpoint in {folder}", "there is no config.json", "check the folder's name") from None
    except ValueError as error:
        raise HelpersError(f"cannot read {file}", f"it is not JSON ({error})", "download it again") from None
    if not isinstance(original, dict):
        raise HelpersError(f"cannot read {file}", "it holds no settings by name", "download it again")
    return original


def read_original(folder: Path) -> tuple[Original, Family]:
    """Read an original config.json and find its family."""
    original = read_config(folder)
    return original, family_of(original)


def native_config(original: Original) -> PreTrainedConfig:
    """Translate an original config.json to the native class's config; one that is native already stays as it is."""
    from transformers import AutoConfig

    register()
    if not has_family(original):
        settings = {key: value for key, value in original.items() if key != "model_type"}
        return AutoConfig.for_model(original["model_type"], **settings)
    family = family_of(original)
    config = family.config(original)
    config.architectures = config.architectures or [family.native_class]
    return config


def to_original(original: Original, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a family's table backwards: a native state dict in the original's names and layout.

    Rotary buffers, which the native classes compute, are not made up again.
    """
    written = {}
    layers = range(native_config(original).num_hidden_layers)
    for rule in family_of(original).rules(original):
        for layer in layers if "{i}" in rule.source else [0]:
            name = rule.source.replace("{i}", str(layer))
            targets = rule.match(name)
            if targets and all(target in native for target in targets):
                written[name] = rule.join([native[target] for target in targets])
    return written


def convert(
    source: Path | str,
    target: Path | str,
    *,
    adapters: Sequence[Path | str] = (),
    chat_format: str | None = None,
    progress: bool = False,
) -> Path:
    """Convert the original checkpoint in ``source`` to a native one in ``target``.

    Args:
        source: folder with config.json, weight files and (if there is one) the tokenizer's file.
        target: folder to make; an up-to-date result of an earlier run is left as it is.
        adapters: LoRA folders to merge, in this order; the last one's tokenizer is taken.
        chat_format: name of the chat template to store; the family's own when None.
        progress: show a bar over the shards.

    Returns:
        ``target``, which ``AutoModelForCausalLM`` and ``AutoTokenizer`` read.

    Raises:
        HelpersError: the checkpoint cannot be converted exactly, ``target`` holds something else, or the disk is
            full; nothing is left behind but ``<target>.lock``, and that only once writing began. When the run is
            interrupted, finished shards stay in ``<target>.partial`` and the next run goes on from them.
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    source, target = Path(source), Path(target)
    work = Conversion(source, [Path(folder) for folder in adapters], chat_format)
    if _receipt(target) == work.receipt:
        return target
    work.check()
    _check_replaceable(target, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):
        if _receipt(target) == work.receipt:  # another process made it while this one waited
            return target
        partial = target.with_name(target.name + ".partial")
        if _receipt(partial) != work.receipt:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(exist_ok=True)
            (partial / RECEIPT).write_text(json.dumps(work.receipt, indent=1))
            work.write_shards(partial, progress)
            work.write_rest(partial)
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise HelpersError(
                f"cannot write {target.name}",
                f"the disk is full: {work.size / 1e9:.2f} GB are needed, "
                f"{shutil.disk_usage(target.parent).free / 1e9:.2f} GB are free",
                "free some space, or set LLM_DEPLOY_CACHE to a folder on a larger disk",
            ) from None
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return target


def merge_lora(base: Path | str, lora: Path | str, target: Path | str, **options: Any) -> Path:
    """Convert a Llama base with one LoRA merged into it: ``convert`` with a single adapter."""
    return convert(base, target, adapters=[lora], **options)


class Conversion:
    """What is known of one conversion before anything is written."""

    def __init__(self, source: Path, adapters: list[Path], chat_format: str | None) -> None:
        """Read the small files of the checkpoint and find its weight files."""
        self.source = source
        self.original, self.family = read_original(source)
        self.adapters = [Adapter(folder) for folder in adapters]
        self.vocabulary_folder = source
        for adapter in self.adapters:
            before, self.original = self.original, adapter.adapt_config(self.original)
            if self.original != before:
                self.vocabulary_folder = adapter.folder
        self.config = native_config(self.original)
        self.chat_format = chat_format or self.family.chat_format
        names = self.family.vocabulary
        with_tokenizer = [folder for folder in [source, *adapters] if any((folder / name).exists() for name in names)]
        without = source if self.config.vocab_size == self.family.shared else None
        self.tokenizer_folder = with_tokenizer[-1] if with_tokenizer else without
        self.rules: list[Rule] = self.family.rules(self.original)
        self.files = weight_files(source)
        self.size = sum(file.stat().st_size for file in self.files)
        self.receipt = {
            "recipe": RECIPE,
            "chat_format": self.chat_format,
            "files": [stamp for folder in [source, *adapters] for stamp in file_stamps(folder)],
        }

    def targets(self, name: str) -> tuple[Rule, tuple[str, ...]]:
        """Find the rule about an original tensor and the native names it fills."""
        for rule in self.rules:
            targets = rule.match(name)
            if targets is not None:
                tied_head = self.config.tie_word_embeddings and targets == ("lm_head.weight",)
                return rule, () if tied_head else targets
        raise _wrong(f"the checkpoint holds {name!r}, which is no tensor of {self.family.model_type}")

    def adapted(self, name: str, tensor: Tensor) -> Tensor:
        """Return an original tensor with the adapters merged in."""
        for adapter in self.adapters:
            tensor = adapter.apply(name, tensor)
        return tensor

    @cached_property
    def dtype(self) -> Any:
        """The floating-point type of the weights, that of the first file's first tensor."""
        return next(tensor.dtype for tensor in open_shard(self.files[0]).values() if tensor.is_floating_point())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The native tokenizer, of the last adapter that brings one or else of the base; None where none is."""
        folder = self.tokenizer_folder
        return folder and self.family.tokenizer(folder, self.original, self.chat_format)

    def check(self) -> None:
        """Compare what the files would become with an empty native model, by names and shapes.

        The table is run on meta tensors, which have a shape and no values.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(self.config)
        wanted = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
        if self.config.tie_word_embeddings:
            wanted.pop("lm_head.weight", None)

        sources, made = set(), {}
        for file in self.files:
            for name, tensor in open_shard(file).items():
                sources.add(name)
                rule, targets = self.targets(name)
                if targets:
                    try:
                        parts = rule.split(self.adapted(name, tensor.to("meta")))
                    except RuntimeError:
                        raise _wrong(f"{name!r}, {list(tensor.shape)}, cannot be cut as config.json says") from None
                    made |= {target: list(part.shape) for target, part in zip(targets, parts, strict=True)}
        for adapter in self.adapters:
            adapter.check_complete(sources)
        for name in sorted(wanted.keys() | made.keys()):
            if name not in made:
                raise _wrong(f"no tensor becomes {name!r}: the checkpoint is incomplete")
            if name not in wanted:
                raise _wrong(f"{name!r} has no place in a model of {self.config.num_hidden_layers} layers")
            if made[name] != wanted[name]:
                raise _wrong(f"{name!r} would have shape {made[name]}, config.json asks for {wanted[name]}")
        self.check_tokenizer()

    def check_tokenizer(self) -> None:
        """Refuse a tokenizer with more tokens than embeddings, and one from before the vocabulary grew."""
        if self.tokenizer is None:
            return
        folders = [self.source, *(adapter.folder for adapter in self.adapters)]
        older = folders.index(self.tokenizer_folder) < folders.index(self.vocabulary_folder)
        tokens, rows = 1 + max(self.tokenizer.get_vocab().values()), self.config.vocab_size
        if tokens > rows or (older and tokens < rows):
            raise HelpersError(
                f"cannot use the tokenizer in {self.tokenizer_folder.name}",
                f"it has {tokens} tokens, and the model has embeddings for {rows}",
                "take the tokenizer files published with these weights (of an adapter: put them into its folder)",
            )

    def write_shards(self, folder: Path, progress: bool) -> None:
        """Write one target shard a source shard, each under a temporary name first; several get an index."""
        from safetensors.torch import save_file
        from tqdm.auto import tqdm

        for stray in folder.iterdir():  # what a killed run was writing; safetensors leaves a hidden file
            if stray.name != RECEIPT and stray.suffix != ".safetensors":
                stray.unlink()
        left = self.size - sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if shutil.disk_usage(folder).free < left:
            raise OSError(errno.ENOSPC, "No space left on device")
        weight_map, total = {}, 0
        for number, file in enumerate(tqdm(self.files, "converting", disable=not progress), start=1):
            place = f"-{number:05d}-of-{len(self.files):05d}" if len(self.files) > 1 else ""
            done = folder / f"model{place}.safetensors"
            shard, tensors = open_shard(file), {}
            for name in shard:
                rule, targets = self.targets(name)
                weight_map |= dict.fromkeys(targets, done.name)
                if targets and not done.exists():
                    # A map of its own for each tensor: the pages of one that was copied go with it, at once.
                    parts = rule.split(self.adapted(name, open_shard(file)[name]))
                    tensors |= {target: part.contiguous() for target, part in zip(targets, parts, strict=True)}
            if not done.exists():
                writing = done.with_suffix(".writing")
                save_file(tensors, writing, metadata={"format": "pt"})
                writing.rename(done)
            total += done.stat().st_size
        if len(self.files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def write_rest(self, folder: Path) -> None:
        """Write config.json, the tokenizer and the generation settings."""
        from transformers import GenerationConfig

        self.config.dtype = self.dtype
        self.config.save_pretrained(folder)
        stops = self.config.eos_token_id
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
            stops = self.family.stops(self.tokenizer, self.chat_format)
        pad = self.config.pad_token_id
        GenerationConfig(
            bos_token_id=self.config.bos_token_id,
            eos_token_id=stops,
            pad_token_id=pad if pad is not None else self.config.eos_token_id,
            do_sample=False,
        ).save_pretrained(folder)


def file_stamps(folder: Path) -> list[list[str | int]]:
    """Return name, bytes and time of change (ns) of a folder's files: what tells a result of theirs from an old one."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [[name, about.st_size, about.st_mtime_ns] for name, about in files]


def weight_files(folder: Path) -> list[Path]:
    """List a checkpoint's weight files, safetensors before .bin and .pth; raises when one of an index is missing."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise HelpersError(
                    f"cannot read {index.name}", "it is not an index of shards", "download it again"
                ) from None
            files = [folder / name for name in sorted(set(names))]
            missing = [file.name for file in files if not file.exists()]
            if missing:
                raise HelpersError(
                    f"{folder.name} is incomplete", f"shard {', '.join(missing)} is missing", "download it again"
                )
            return files
        if single.exists():
            return [single]
    raw = sorted(folder.glob("*.pth"))  # BlinkDL's RWKV: one file is one model
    if len(raw) > 1:
        names = ", ".join(file.name for file in raw)
        raise HelpersError(f"several models in {folder.name}", names, "keep one of them in a folder of its own")
    if raw:
        return raw
    raise HelpersError(
        f"no weights in {folder}",
        "there is neither model.safetensors nor pytorch_model.bin, nor an index of shards, nor a .pth",
        "download the whole checkpoint",
    )


def open_shard(file: Path) -> dict[str, Tensor]:
    """Map one weight file into memory: tensors are views of the file, whose pages are read when touched.

    Raises:
        HelpersError: the file is truncated, damaged or only a pointer to one, or a .bin holds anything but tensors
            (it is not unpickled).
    """
    import torch
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise HelpersError(
                f"cannot read {file.name}",
                "it is a Git LFS pointer, a few lines of text that stand for the weights: the repository was cloned "
                "without Git LFS",
                f"run git lfs install and git lfs pull in {file.parent.name}, or download the file again",
            )
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise HelpersError(
            f"refused to load {file.name}",
            f"it holds more than tensors and could run code when unpickled ({_first_line(error)})",
            "take the safetensors file of this model, or a copy from its publisher",
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise HelpersError(
            f"cannot read {file.name}",
            f"the file is truncated or damaged ({_first_line(error)})",
            "download this shard again",
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise HelpersError(
            f"cannot read {file.name}",
            "it holds something else than tensors by name",
            "take the file that the model's publisher names for inference",
        )
    return tensors


def _check_replaceable(target: Path, source: Path) -> None:
    """Refuse to write over anything but an earlier conversion: what stands there would be deleted."""
    if target.resolve() == source.resolve():
        why = "it is the checkpoint to convert"
    elif target.exists() and _receipt(target) is None and (target.is_file() or any(target.iterdir())):
        why = f"it exists and holds no {RECEIPT}, so it is not the result of an earlier conversion"
    else:
        return
    raise HelpersError(f"will not replace {target}", why, "name a folder that does not exist yet")


def _first_line(error: Exception) -> str:
    """Return the first line of a message, cut between words where it is long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return textwrap.shorten(line, 100, placeholder=" ...")


def _wrong(why: str) -> HelpersError:
    return HelpersError("cannot convert this checkpoint", why, "check that config.json and weights belong together")


def _receipt(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECEIPT).read_text())
    except (OSError, ValueError):
        return None
