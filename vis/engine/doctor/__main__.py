"""The command; see :mod:`vis.engine.doctor`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence

from vis.engine.doctor.findings import GOOD, Finding, any_bad, bad, note
from vis.engine.doctor.packages import can_go_on, check_packages

_HELP = """Looks at everything that a training needs, and says in plain words what is wrong and what to do about it.

  python -m vis.doctor                                   Python, packages, CUDA, the compiled op
  python -m vis.doctor --config-file C [KEY VALUE ...]   and what a training with this configuration needs:
      data sets, number of classes, weights and their stage, room on the disk, memory, two steps on the data

Nothing is written. The exit status is 0 where nothing is wrong, 1 where something is, 2 for a wrong command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vis.doctor", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="the yaml of a training")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps to try (default 2, 0 for none)")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes that will train (default 1)")
    parser.add_argument("--download", action="store_true", help="fetch weights that are named by an address")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="values that override the config")
    args = parser.parse_args(argv)
    if any(word.startswith("--") for word in args.opts):
        parser.error("flags stand before the KEY VALUE pairs")
    if args.opts and args.config_file is None:
        parser.error("KEY VALUE pairs need --config-file")
    if args.steps < 0 or args.num_gpus < 1:
        parser.error("--steps must be 0 or more, --num-gpus 1 or more")
    findings = []
    for finding in examine(args):
        print("\n".join(finding.lines()), flush=True)
        findings.append(finding)
    wrong = sum(finding.level not in (GOOD, "note") for finding in findings)
    print(f"\n{wrong} thing{'s' * (wrong != 1)} to mend" if wrong else "\nnothing is wrong")
    return int(any_bad(findings))


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Every check that can be made, the ones that others rest on first."""
    yield from check_packages()
    if not can_go_on():
        yield note("the rest", "is not looked at before the packages above are there")
        return
    from vis.engine.doctor.machine import check_machine, check_op

    logging.getLogger("vis").setLevel(logging.ERROR)  # findings say it
    yield from check_machine()
    if args.config_file is None:
        yield from check_op("cpu")
        yield from check_op("cuda") if _cuda() else ()
        return
    yield from _configuration(args)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _configuration(args: argparse.Namespace) -> Iterator[Finding]:
    from vis.data.problems import DatasetError
    from vis.engine.config import load_cfg
    from vis.engine.doctor.findings import good
    from vis.engine.doctor.machine import check_op
    from vis.engine.doctor.setting import check_classes, check_data
    from vis.engine.doctor.steps import check_training
    from vis.engine.launch import uses_cuda

    try:
        cfg = load_cfg(args.config_file, args.opts)
    except DatasetError as error:
        yield bad("data", str(error), "the number of classes comes from this json: mend it first")
        return
    except (FileNotFoundError, ValueError, ImportError) as error:
        yield bad("config", str(error), "configs/README.md has the keys; train_net.py --help shows how they are given")
        return
    yield good("config", f"{args.config_file}: {cfg.MODEL.META_ARCHITECTURE}")
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda") and not _cuda():
        yield bad("device", f"MODEL.DEVICE is {device}, and torch finds no GPU", "MODEL.DEVICE auto, or see CUDA above")
        return
    yield from check_op("cuda" if uses_cuda(device) else "cpu", cfg.MODEL.MS_DEFORM_ATTN_BACKEND)
    found = [*check_data(cfg), *check_classes(cfg)]
    yield from found
    steps = args.steps
    if any_bad(found) and steps:
        yield note("dry steps", "are left out before the data are right")
        steps = 0
    yield from check_training(cfg, steps=steps, processes=args.num_gpus, download=args.download)


if __name__ == "__main__":
    sys.exit(main())
