"""``python -m helpers.checkpoints.make prepare | train | evaluate``: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...errors import HelpersError
from .originals import STAND_INS


def main(arguments: list[str] | None = None) -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(prog="python -m helpers.checkpoints.make", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="clean the poems; writes corpus.jsonl.gz and the shipped sets")
    prepare.add_argument("--corpus", type=Path, help="unpacked npm package chinese-poetry 2.0.1; downloaded if absent")
    prepare.add_argument("--output", type=Path, default=Path("build/corpus"))

    train = commands.add_parser("train", help="train stand-ins and evaluate them")
    train.add_argument("--prepared", type=Path, help="folder that prepare filled; else the shipped 2,000 poems")
    train.add_argument("--models", nargs="+", default=["all"], choices=["all", *STAND_INS], metavar="MODEL")
    train.add_argument("--output", type=Path, default=Path("helpers/checkpoints/tiny"))
    train.add_argument("--steps", type=int)
    train.add_argument("--batch", type=int)
    train.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--compile", action="store_true", help="use torch.compile")

    evaluate = commands.add_parser("evaluate", help="measure stand-ins again; prints, writes nothing")
    evaluate.add_argument("folders", nargs="+", type=Path)

    options = parser.parse_args(arguments)
    try:
        if options.command == "prepare":
            from .poems import prepare as run

            print(json.dumps(run(options.output, options.corpus)))
        elif options.command == "evaluate":
            from .evaluate import evaluate as measure

            for folder in options.folders:
                print(json.dumps({"model": folder.name, **measure(folder)}), flush=True)
        else:
            _train(options)
    except HelpersError as error:
        sys.exit(str(error))


def _train(options: argparse.Namespace) -> None:
    import torch

    from .evaluate import report
    from .train import BATCH, STEPS, make_tiny

    steps, batch = options.steps or STEPS, options.batch or BATCH
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    for model in STAND_INS if "all" in options.models else options.models:
        (folder,) = make_tiny(
            [model],
            options.output,
            steps=steps,
            batch=batch,
            device=options.device,
            seed=options.seed,
            prepared=options.prepared,
            compiled=options.compile,
        )
        print(json.dumps(report(folder, steps=steps, batch=batch, seed=options.seed, device=device)), flush=True)


if __name__ == "__main__":
    main()
