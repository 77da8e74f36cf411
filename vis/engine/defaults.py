"""The command line and what is set up once at the start of every job."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from vis.checkpoint import write_text_atomic
from vis.config import CfgNode
from vis.engine.peers import explained
from vis.engine.state import plain_config

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_EXAMPLES = """
examples:
  train on one GPU, or on the CPU where there is none
    {prog} --config-file configs/minvis/ytvis19_r50.yaml OUTPUT_DIR output/minvis
  change values of the config: KEY VALUE pairs, after all flags
    {prog} --config-file cfg.yaml SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 5e-5
  continue a training that was stopped, from the last checkpoint in OUTPUT_DIR
    {prog} --config-file cfg.yaml --resume OUTPUT_DIR output/minvis
  evaluate weights
    {prog} --config-file cfg.yaml --eval-only MODEL.WEIGHTS output/minvis/model_final.pth
  8 GPUs of one machine (with MODEL.DEVICE cpu: 8 processes)
    {prog} --config-file cfg.yaml --num-gpus 8
    torchrun --nproc-per-node 8 {prog} --config-file cfg.yaml
    torchrun --nproc-per-node 8 --max-restarts 3 {prog} --config-file cfg.yaml --resume     (restarts continue)
  2 machines
    (machine 0) {prog} --config-file cfg.yaml --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
    (machine 1) {prog} --config-file cfg.yaml --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT

SOLVER.IMS_PER_BATCH counts the clips of an update, over all GPUs together. With SOLVER.REFERENCE_WORLD_SIZE 8, as the
recipes have it, fewer GPUs accumulate gradients and train on the same batches; the log says in how many steps.
"""


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """detectron2's command line, with examples in ``--help``."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_EXAMPLES.format(prog=os.path.relpath(sys.argv[0]) if sys.argv[0] else "train_net.py"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="the yaml to run (needed)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR, if there is one"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (with --resume: the last checkpoint)"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs of this machine to use (default 1)")
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="machines that work together (default 1)"
    )
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="which of them this is, from 0")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="where the processes meet; needed for several machines"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="values that override the config")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, and stop with exit status 2 where a flag stands among the KEY VALUE pairs, which would swallow it."""
    args = parser.parse_args(argv)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for word in args.opts:
        if word.split("=")[0] in flags or re.match(r"--[a-z]", word):
            parser.error(
                f"{word} stands after the KEY VALUE pairs, where flags are not read: put all flags before them"
            )
    if not args.config_file:
        parser.error("--config-file FILE is needed; configs/ holds the ones of this project")
    if len(args.opts) % 2:
        parser.error(f"overrides must be pairs KEY VALUE, found an odd number of words: {' '.join(args.opts)}")
    return args


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Output folder, loggers, ``config.yaml``, the seed and a few words on the environment.

    ``cfg`` is frozen; a negative ``SEED`` in it is replaced by the one that is used (by that of the run before with
    ``--resume``), so that config, loader and log agree.
    """
    folder = Path(cfg.OUTPUT_DIR)
    rank = comm.get_rank()
    if comm.is_main_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"OUTPUT_DIR {folder} cannot be made a folder: a file has that name ({error})") from error
    comm.synchronize()
    setup_logger.cache_clear()  # a second job in one process has a log of its own
    for name in ("fvcore", "detectron2", "vis"):
        logging.getLogger(name).handlers.clear()
        setup_logger(str(folder), distributed_rank=rank, name=name)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment: %s", environment())
    logger.info("Command line: %s", " ".join(sys.argv))
    _settle_seed(cfg, resume=getattr(args, "resume", False))
    text = plain_config(cfg)
    logger.info("Config %s, in full:\n%s", getattr(args, "config_file", ""), text)
    path = folder / CONFIG_FILE
    # An evaluation in the folder of a training leaves the config of the training.
    if comm.is_main_process() and not (getattr(args, "eval_only", False) and path.exists()):
        write_text_atomic(text, path)
        logger.info("Full config saved to %s", path)
    seed_all_rng(cfg.SEED + rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not getattr(args, "eval_only", False)
    if cfg.SOLVER.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def _settle_seed(cfg: CfgNode, resume: bool) -> None:
    if cfg.SEED >= 0:
        return
    seed = None
    saved = Path(cfg.OUTPUT_DIR) / CONFIG_FILE
    if resume and saved.is_file():
        seed = yaml.safe_load(saved.read_text(encoding="utf-8")).get("SEED")
    if seed is None or seed < 0:
        seed = int.from_bytes(os.urandom(3), "big")
    seed = comm.all_gather(seed)[0]  # that of rank 0 for all
    logger.info("SEED is negative: using %d", seed)
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()


def environment() -> str:
    """Versions and devices in one line; nothing is compiled or probed for it."""
    words = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    words += [f"{name} {_version(name)}" for name in ("torchvision", "detectron2", "numpy")]
    words.append(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        words.append(
            f"CUDA {torch.version.cuda}: "
            + ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        )
    else:
        words.append("no CUDA device")
    return "; ".join(words)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "absent"
    return getattr(importlib.import_module(name), "__version__", "?")


def _traceback_to_file() -> None:
    """The traceback goes to ``log.txt``, not to the screen."""
    root = logging.getLogger("vis")
    record = root.makeRecord(root.name, logging.ERROR, __file__, 0, "stopped by", (), sys.exc_info())
    for handler in root.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream not in (sys.stdout, sys.stderr):
            handler.handle(record)


def run_tool(function: Callable[..., Any], *args: Any, debug: bool = False) -> int:
    """Call ``function`` and turn the errors that a user can cause into one message and exit status 1.

    Errors of the program itself keep their traceback; ``debug`` keeps all of them.
    """
    try:
        with explained():
            function(*args)
    except ProcessExitedException as error:  # one of several processes, which has printed its own message
        return error.exit_code or 1
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        _traceback_to_file()
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"error: {error}", file=sys.stderr)
        print(
            f"({type(error).__name__} in {Path(where.filename).name}:{where.lineno}; --debug shows the traceback)",
            file=sys.stderr,
        )
        return 1
    return 0
