#!/usr/bin/env python
"""Convert weights between the names of releases and ours, and between file formats.

    python tools/convert_checkpoint.py resnet50-11ad3fa6.pth R50.safetensors
    python tools/convert_checkpoint.py R50.safetensors resnet50.pth --to released --source torchvision
    python tools/convert_checkpoint.py model_final_3c8ec9.pkl coco_r50.pth --config-file configs/coco/instance_r50.yaml

The names in IN tell which release it is of. OUT is a .pth or a .safetensors file, without the optimizer unless asked.
With --config-file the result is loaded into that model as an evaluation would load it (a backbone: as a training does),
and OUT is written only if it fits. Exit status 0: written; 2: a file, an option or the configuration is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vis.checkpoint import SOURCES, convert, load_state, read_weights, save_weights
from vis.engine import load_cfg
from vis.modeling import build_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN", help="a file, or an https://, detectron2:// or hf:// address")
    parser.add_argument("output", metavar="OUT", help="a .pth, .pt or .safetensors file")
    parser.add_argument("--to", choices=("ours", "released"), default="ours", help="whose names OUT has")
    parser.add_argument("--source", default="", metavar="NAME", help=f"of what release: {', '.join(SOURCES)}")
    parser.add_argument("--half", action="store_true", help="floating-point tensors as float16")
    parser.add_argument(
        "--strip-optimizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out everything but the weights (default); a .pth can keep it",
    )
    parser.add_argument("--config-file", metavar="C", help="check the result against the model of this configuration")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides of the configuration"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, check, write, report."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        weights = read_weights(args.input)
        if Path(args.output).exists() and Path(args.output).samefile(weights.path):
            raise ValueError(f"{args.output} is the input itself")
        result = convert(weights, to=args.to, source=args.source, half=args.half)
        print(f"{args.input}: {result.summary()}")
        if args.config_file:
            model = build_model(load_cfg(args.config_file, args.opts))
            converted = dataclasses.replace(weights, state=result.state)
            print(load_state(model, converted, args.input, training=result.source.backbone).summary())
        kept = {} if args.strip_optimizer else weights.content
        save_weights(result.state, args.output, **{str(key): value for key, value in kept.items()})
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{args.output}: {len(result.state)} tensors, {Path(args.output).stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
