"""IAI (Zhu et al., ECCV 2022) once more, from its description alone: loops over pixels, heads, detections; in float64.

Nothing of ``vis`` is used. Layouts: tokens (h*w, C) row by row, maps (C, h, w); weights by the release's names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Weights = Mapping[str, np.ndarray]

# ------------------------------------------------------------------------------------------- the association block


def sine_encoding(height: int, width: int, dim: int) -> np.ndarray:
    """(h*w, dim): half for y, half for x; sine on even, cosine on odd channels; coordinates from 0 to 2 pi."""
    half = dim // 2
    code = np.zeros((height * width, dim))
    for y in range(height):
        for x in range(width):
            for start, place, last in ((0, y, height - 1), (half, x, width - 1)):
                angle = place / (last + 1e-6) * 2 * math.pi
                for channel in range(half):
                    value = angle / 10000 ** (2 * (channel // 2) / half)
                    code[y * width + x, start + channel] = math.cos(value) if channel % 2 else math.sin(value)
    return code


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return np.stack([weights[f"{name}.weight"] @ row + weights[f"{name}.bias"] for row in x])


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    rows = []
    for row in x:
        centred = row - row.mean()
        rows.append(centred / math.sqrt((centred**2).mean() + 1e-5))
    return np.stack(rows) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    """Every token of ``q`` attends to every token of ``k``, head by head."""
    size = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for token in range(len(q)):
            logits = np.array([q[token, part] @ key / math.sqrt(size) for key in k[:, part]])
            out[token, part] = sum(share * row for share, row in zip(softmax(logits), v[:, part], strict=True))
    return out


def local_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, size: tuple[int, int], heads: int, radius: int, weights: Weights
) -> np.ndarray:
    """Every position attends to those of the other frame at most ``radius`` rows and columns away."""
    height, width = size
    side, depth = 2 * radius + 1, q.shape[1] // heads
    relative = weights["short_term_attn.relative_emb.weight"].reshape(heads, side * side, depth)
    offset = weights["short_term_attn.relative_emb.bias"].reshape(heads, side * side)
    shift = weights["short_term_attn.V_bias"].reshape(heads, depth, side * side)
    out = np.zeros_like(q)
    for head, y, x in itertools.product(range(heads), range(height), range(width)):
        part = slice(head * depth, (head + 1) * depth)
        query = q[y * width + x, part]
        logits, values = [], []
        for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
            if not (0 <= y + dy < height and 0 <= x + dx < width):
                continue
            slot, key = (dy + radius) * side + dx + radius, (y + dy) * width + x + dx
            logits.append(query @ k[key, part] / math.sqrt(depth) + relative[head, slot] @ query + offset[head, slot])
            values.append(v[key, part] + shift[head, :, slot])
        shares = softmax(np.array(logits))
        out[y * width + x, part] = sum(share * value for share, value in zip(shares, values, strict=True))
    return out


def feed_forward(x: np.ndarray, size: tuple[int, int], groups: int, weights: Weights) -> np.ndarray:
    """Linear, group norm, GELU, gate of channels, depth-wise 5 x 5, linear."""
    height, width = size
    hidden = linear(x, weights, "linear1").T.reshape(-1, height, width)
    channels = len(hidden)
    per = channels // groups
    for group in range(groups):
        part = hidden[group * per : (group + 1) * per]
        hidden[group * per : (group + 1) * per] = (part - part.mean()) / math.sqrt(part.var() + 1e-5)
    gamma, beta = weights["activation.gn.weight"], weights["activation.gn.bias"]
    hidden = hidden * gamma[:, None, None] + beta[:, None, None]
    erf = np.vectorize(math.erf)
    hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
    alpha, gain, bias = (weights[f"activation.GCT.{name}"].reshape(-1) for name in ("alpha", "gamma", "beta"))
    energy = np.array([alpha[c] * math.sqrt((hidden[c] ** 2).sum() + 1e-5) for c in range(channels)])
    norm = gain / math.sqrt((energy**2).mean() + 1e-5)
    hidden = hidden * (1 + np.tanh(energy * norm + bias))[:, None, None]
    kernel = weights["activation.conv.weight"][:, 0]
    out = np.zeros_like(hidden)
    for y, x_ in itertools.product(range(height), range(width)):
        for dy, dx in itertools.product(range(-2, 3), repeat=2):
            if 0 <= y + dy < height and 0 <= x_ + dx < width:
                out[:, y, x_] += kernel[:, dy + 2, dx + 2] * hidden[:, y + dy, x_ + dx]
    return linear(out.reshape(channels, -1).T, weights, "linear2")


@dataclass
class Block:
    """One hybrid association block and its parts: x -> (out, key that the frame offers, value before the ids)."""

    weights: Weights
    size: tuple[int, int]
    self_heads: int
    attn_heads: int
    radius: int
    groups: int = 32
    self_attention: bool = True
    use_local: bool = True
    use_global: bool = True

    def value(self, u: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """What is remembered of a frame: ``u`` of it and the embedding of its id map, both (h*w, C)."""
        return linear(u + ids, self.weights, "linear_V")

    def __call__(
        self,
        x: np.ndarray,
        local: tuple[np.ndarray, np.ndarray] | None,
        stored: Sequence[tuple[np.ndarray, np.ndarray]],
        empty: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``local``: (key, value) of the frame before, None in the first frame, which attends to itself with ``empty``,
        the embedding of a map without any id."""
        w = self.weights
        if self.self_attention:
            u = layer_norm(x, w, "norm2")
            placed = u + sine_encoding(*self.size, x.shape[1])
            q, k, v = (
                linear(placed, w, "self_attn.linear_Q"),
                linear(placed, w, "self_attn.linear_K"),
                linear(u, w, "self_attn.linear_V"),
            )
            x = x + linear(attention(q, k, v, self.self_heads), w, "self_attn.projection")
        u = layer_norm(x, w, "norm1")
        key = linear(u, w, "linear_Q")
        if local is None:
            local = (key, self.value(u, empty))
            stored = [local]
        added = np.zeros_like(x)
        if self.use_global:
            keys, values = (np.concatenate([entry[i] for entry in stored]) for i in range(2))
            added += linear(attention(key, keys, values, self.attn_heads), w, "long_term_attn.projection")
        if self.use_local:
            near = local_attention(key, *local, self.size, self.attn_heads, self.radius, w)
            added += linear(near, w, "short_term_attn.fc")
        x = x + added
        x = x + feed_forward(layer_norm(x, w, "norm3"), self.size, self.groups, w)
        return x, key, u


def id_embedding(labels: np.ndarray, channels: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(h*w, C) of a label map (H, W): a convolution of 33 x 33 in steps of 32 over its one-hot channels.

    A label that is no channel sets none.
    """
    height, width = labels.shape
    rows = []
    for y, x in itertools.product(range(0, height, 32), range(0, width, 32)):
        total = bias.copy()
        for dy, dx in itertools.product(range(-16, 17), repeat=2):
            if 0 <= y + dy < height and 0 <= x + dx < width and labels[y + dy, x + dx] < channels:
                total = total + weight[:, labels[y + dy, x + dx], dy + 16, dx + 16]
        rows.append(total)
    return np.stack(rows)


# ------------------------------------------------------------------------------------------------------ the memory


def stored_frames(new: Sequence[bool], interval: int) -> list[int]:
    """Frames in the global memory after a video, of which ``new`` says in which frames an object was new."""
    frames = [0]
    step, last = 1, 0
    for frame in range(1, len(new)):
        step += 1
        if step - last >= interval or new[frame]:
            frames.append(frame)
            last = step
    return frames


# ------------------------------------------------------------------------------------------------- ids in training


def head_labels(annotated: Sequence[Sequence[int]], num_ids: int) -> tuple[list[dict[int, int]], dict[int, int]]:
    """For each frame {object: label of the id head}, and {object: channel of the id map}.

    Args:
        annotated: ids of the objects in each frame of the clip.
    """
    everyone = sorted({item for frame in annotated for item in frame})
    channel = {item: index for index, item in enumerate(everyone)}
    labels, known = [], set()
    for frame in annotated:
        labels.append({item: channel[item] if item in known else num_ids - 1 for item in frame})
        known |= set(frame)
    return labels, channel


def label_map(masks: np.ndarray, channels: Sequence[int], background: int) -> np.ndarray:
    """Masks (n, H, W) -> (H, W): where they overlap the smaller one, by its area."""
    areas = [int(mask.sum()) for mask in masks]
    out = np.full(masks.shape[1:], background)
    for y, x in itertools.product(*map(range, out.shape)):
        here = [index for index in range(len(masks)) if masks[index, y, x]]
        if here:
            out[y, x] = channels[min(here, key=lambda index: areas[index])]
    return out


# ---------------------------------------------------------------------------------------------- identities of a video


def visible_parts(masks: np.ndarray, share: float) -> tuple[list[int], np.ndarray]:
    """(detections that are kept, the visible part of each detection's mask); the first have the best rank."""
    free = np.ones(masks.shape[1:], dtype=bool)
    kept, visible = [], np.zeros_like(masks)
    for index, mask in enumerate(masks):
        visible[index] = mask & free
        free &= ~mask
        if mask.sum() and visible[index].sum() / mask.sum() >= share:
            kept.append(index)
    return kept, visible


def best_columns(scores: np.ndarray) -> tuple[int, ...]:
    """The columns, one for each row and each at most once, with the largest sum; by trying all."""
    return max(
        itertools.permutations(range(scores.shape[1]), len(scores)),
        key=lambda columns: sum(scores[row, column] for row, column in enumerate(columns)),
    )


@dataclass
class Identities:
    """One video.

    Attributes:
        released: identities that nobody has count as "new" where they are assigned, and when there are no more the last
            one is overwritten; otherwise they cannot be assigned, and further new objects are dropped.
    """

    num_ids: int
    released: bool
    following: int = 0
    first: bool = True
    events: list[str] = field(default_factory=list)

    def step(self, id_scores: np.ndarray) -> tuple[list[int], bool]:
        """Of k detections, the best rank first, with (k, N) id scores: (their ids, -1 for dropped; anything new)."""
        count, new_column = len(id_scores), self.num_ids - 1
        known = self.following
        columns: list[int | None] = [None] * count
        if not self.first and count:
            table = np.zeros((count, self.num_ids + count))
            table[:, : self.num_ids] = id_scores
            table[:, self.num_ids + 1 :] = id_scores[:, new_column : new_column + 1]
            if not self.released:
                table[:, known:new_column] = -1e6
            columns = list(best_columns(table))
        self.first = False
        ids: list[int] = []
        new = False
        for column in columns:
            if column is not None and column < known and column not in ids:
                ids.append(column)
                continue
            identity, isnew = self._next()
            ids.append(identity)
            new = new or isnew
        return ids, new

    def _next(self) -> tuple[int, bool]:
        identity = self.following
        if self.released:
            self.following = min(identity + 1, self.num_ids - 2)
            return identity, self.following > identity
        if identity == self.num_ids - 1:
            return -1, False
        self.following = identity + 1
        return identity, True


def video_scores(
    frames: Sequence[Mapping[int, np.ndarray]], threshold: float, most: int
) -> list[tuple[float, int, int]]:
    """(score, id, class) of a video, best first, of each frame's {id: class scores}; absent frames count as 0."""
    totals: dict[int, np.ndarray] = {}
    for frame in frames:
        for identity, scores in frame.items():
            totals[identity] = totals.get(identity, 0) + scores / len(frames)
    pairs = [(float(score), who, c) for who, scores in totals.items() for c, score in enumerate(scores)]
    return [pair for pair in sorted(pairs, reverse=True)[:most] if pair[0] > threshold]


def frame_map(visible: np.ndarray, ids: Sequence[int], num_ids: int, none: int) -> np.ndarray:
    """What is remembered of a frame: (H, W) ids of the visible parts (n, H, W), ``num_ids`` for background.

    A later detection with the same id takes the place of the earlier, whose pixels then are of no channel (``none``).
    """
    out = np.full(visible.shape[1:], num_ids)
    for place in itertools.product(*map(range, out.shape)):
        owners = [row for row, who in enumerate(ids) if who >= 0 and visible[(row, *place)]]
        for row in owners:
            out[place] = ids[row] if ids[row] not in ids[row + 1 :] else none
    return out
