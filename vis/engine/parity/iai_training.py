"""Training steps of the released IAI: targets, losses of each frame, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from vis.checkpoint import SOURCES
from vis.engine.parity.common import clip_sample
from vis.engine.parity.compared import Comparison
from vis.engine.parity.outputs import relative_error
from vis.modeling.criterions.iai import clip_identities, frame_targets
from vis.modeling.heads.fcos import locations_of
from vis.modeling.meta_arch.iai import IAI
from vis.structures import ClipSample

_FRAMES = 5
_CLASSES = (1, 4, 37)
BAR, GRADIENT_BAR, NORM_BAR = 1e-4, 1e-3, 5e-3
#: (norms of the mask branch with their running statistics, clips)
STEPS: dict[str, tuple[bool, int]] = {
    "train.bn_eval.b1.": (True, 1),
    "train.bn_batch.b1.": (False, 1),
    "train.bn_batch.b2.": (False, 2),
}


def check_training(model: IAI, compared: Comparison, masks: Tensor, refill: Callable[[], None]) -> None:
    """The steps that are recorded.

    Args:
        masks: (N, T, H, W) bool of the recorded clip; refill: gives the model the recorded weights.
    """
    frames = torch.from_numpy(compared.recorded["input"][:_FRAMES])
    for prefix, (running, clips) in STEPS.items():
        if f"{prefix}names" not in compared.recorded or not compared.wanted(prefix):
            continue
        samples = [_sample(frames, masks[:, :_FRAMES], torch.arange(len(masks)))]
        if clips == 2:
            # Mirrored, the second instance left out, the third under its number.
            samples.append(_sample(frames.flip(3), masks[:, :_FRAMES].flip(3), torch.tensor([0, -1, 1])))
        refill()
        model.train()
        if running:
            model.image_model.mask_branch.eval()  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)
        _check_targets(model, samples, prefix, compared)
        losses = model.frame_losses(samples)
        names = [str(name) for name in compared.recorded[f"{prefix}names"]]
        compared.note(f"{prefix}names", set(names) == set(losses[0]), ", ".join(sorted(losses[0])))
        table = torch.stack([torch.stack([frame[name] for name in names]) for frame in losses])
        total = table.mean(dim=0).sum()
        total.backward()
        _close(compared, f"{prefix}per_frame", table)
        _close(compared, f"{prefix}losses", table.mean(dim=0))
        _close(compared, f"{prefix}total", total)
        if f"{prefix}grad.names" in compared.recorded:
            _check_gradients(model, prefix, compared)
        model.zero_grad(set_to_none=True)
    model.eval()


def _close(compared: Comparison, name: str, found: Tensor) -> None:
    """Losses, each relative to itself."""
    theirs = compared.recorded[name]
    ours = found.detach().double().cpu().numpy()
    if ours.shape != theirs.shape:
        compared.note(name, False, f"shape {ours.shape} instead of {theirs.shape}")
        return
    error = float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-12)).max())
    compared.note(name, error <= BAR, f"largest relative error of one {error:.2e}, allowed {BAR:.0e}")


def _sample(frames: Tensor, masks: Tensor, ids: Tensor) -> ClipSample:
    """A clip with boxes around the masks; an id of -1 leaves an instance out."""
    sample = clip_sample(frames.numpy())
    sample["instances"] = []
    for t in range(len(frames)):
        of_frame = BitMasks(masks[:, t])
        present = masks[:, t].flatten(1).any(dim=1) & (ids >= 0)
        sample["instances"].append(
            Instances(
                (int(masks.shape[2]), int(masks.shape[3])),
                gt_classes=torch.tensor(_CLASSES),
                gt_ids=torch.where(present, ids, -1),
                gt_masks=of_frame,
                gt_boxes=of_frame.get_bounding_boxes(),
            )
        )
    return sample


def _check_targets(model: IAI, samples: Sequence[ClipSample], prefix: str, compared: Comparison) -> None:
    """Targets of all frames, frame-major: the first frame of every clip, then the second."""
    padded = model.normalizer.padded_size([tuple(samples[0]["image"][0].shape[-2:])])
    clips = [
        clip_identities(torch.stack([frame.gt_ids for frame in sample["instances"]]), model.num_ids)
        for sample in samples
    ]
    targets = [
        frame_targets(sample["instances"][t], clip, t, padded, model.device)
        for t in range(_FRAMES)
        for sample, clip in zip(samples, clips, strict=True)
    ]
    bank = [clip.channels[clip.visible[t]] for t in range(_FRAMES) for clip in clips]
    compared.equal(f"{prefix}num_gt", torch.tensor([len(target) for target in targets]))
    compared.close(f"{prefix}boxes", torch.cat([target.gt_boxes.tensor for target in targets]), 1e-6)
    compared.equal(f"{prefix}classes", torch.cat([target.gt_classes for target in targets]))
    compared.equal(f"{prefix}head_ids", torch.cat([target.gt_head_ids for target in targets]))
    compared.equal(f"{prefix}bank_ids", torch.cat(bank))
    image_model: Any = model.image_model
    strides = image_model.proposal_generator.fcos_head.strides
    maps = [torch.zeros(padded[0] // stride or 1, padded[1] // stride or 1) for stride in strides[:3]]
    maps += [torch.zeros(-(-padded[0] // stride), -(-padded[1] // stride)) for stride in strides[3:]]
    locations = locations_of([each[None, None] for each in maps], strides)
    found = image_model.criterion.assign(locations, targets)
    shape = (_FRAMES, len(samples), -1)
    compared.equal(f"{prefix}target.labels", found.labels.reshape(shape))
    assert found.ids is not None
    compared.equal(f"{prefix}target.ids", found.ids.reshape(shape))
    early = locations.levels[found.locations] < 3
    compared.equal(
        f"{prefix}target.num_pos", torch.bincount(found.frames[early], minlength=len(targets)).reshape(shape[:2])
    )


def _check_gradients(model: IAI, prefix: str, compared: Comparison) -> None:
    """Norms of the gradients relative to the largest: some are zero in exact arithmetic, and the release's own float32
    norms are off by 2e-4 of the largest. Of those above a thousandth of it the own relative error counts too."""
    recorded = compared.recorded
    parameters = dict(model.named_parameters())
    names = [str(name) for name in recorded[f"{prefix}grad.names"]]
    ours = {SOURCES[model.RECORDING].ours(name): name for name in names}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    missing, further = set(ours) - trained, trained - set(ours)
    compared.note(
        f"{prefix}grad.names",
        not missing and not further,
        f"{len(ours)} trained tensors"
        + (f"; not here {sorted(map(str, missing))[:5]}" if missing else "")
        + (f"; only here {sorted(further)[:5]}" if further else ""),
    )
    if missing:
        return
    norms = []
    for name in ours:
        gradient = parameters[str(name)].grad
        norms.append(0.0 if gradient is None else float(gradient.double().norm()))
    theirs = recorded[f"{prefix}grad.l2"]
    error = relative_error(np.array(norms), theirs)
    large = theirs > 1e-3 * theirs.max()
    single = float((np.abs(np.array(norms) - theirs) / np.maximum(theirs, 1e-12))[large].max())
    compared.note(
        f"{prefix}grad.l2",
        error <= GRADIENT_BAR and single <= NORM_BAR,
        f"largest error {error:.2e} of the largest norm, allowed {GRADIENT_BAR:.0e}; {single:.2e} of a norm, allowed "
        f"{NORM_BAR:.0e}",
    )
