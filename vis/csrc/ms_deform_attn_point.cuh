// What the kernels of multi-scale deformable attention compute once for a sample: its cells, weights and gradients.
// No header of CUDA or PyTorch is needed here: tests/layers/cuda_emulation.h supplies the few names for a host compiler.
#pragma once

#include <math.h>

#include <cstdint>
#include <type_traits>

namespace vis::msda {

constexpr int kMaxLevels = 32;
constexpr int kThreads = 128; // of a block
constexpr unsigned kWarp = 0xffffffffu;

// One axis of a level: what the set-up of a sample needs, converted once on the host.
template <typename S>
struct Extent {
  S size;
  S shift; // position = location * size - shift; 1/2, or out of reach where the level has no cell
  S last; // last cell that has a next one (0 where none has)
  S next; // distance to the next cell: 1, or out of reach where there is none
};

template <typename S>
struct Level {
  Extent<S> x, y;
  int start, width; // first row of value, and rows of value in a line
  int right, below; // rows of value from a cell to its neighbours; 0 where the level has a single column or line
};

// Sizes of a call; a kernel's parameter, so that all threads read it through the constant cache.
template <typename S>
struct Problem {
  int64_t images, pairs; // a pair is one query and one head of one image: pairs = queries * heads
  int64_t rows;
  int heads, channels, levels, points;
  Level<S> level[kMaxLevels];
};

// (x, y), read and written as one 64-bit (128-bit for double) access.
template <typename S>
struct alignas(2 * sizeof(S)) Place {
  S x, y;
};

// One coordinate of a sample. `cell` and the cell after it always lie inside the level; where the sample hangs over the
// border, the pair is moved inside. So no load needs a test, and one index locates all four neighbours. The weight of a
// cell is a tent over its centre, max(0, 1 - |distance|): linear interpolation, and zero for whatever is not beside the
// sample, which is also how points outside get no weight. NaN stays NaN.
template <typename S>
struct Axis {
  S cell;
  S low, high; // weights of `cell` and of the next
  S before, after; // distances to them
};

template <typename S>
__device__ __forceinline__ S tent(S distance) {
  const S height = S(1) - fabs(distance);
  return height < 0 ? S(0) : height; // not fmax, which would hide NaN
}

// Derivative of `tent` to the right (as the shares of floor(position) have it): 1 or -1, and 0 outside.
template <typename S>
__device__ __forceinline__ S tent_slope(S distance) {
  return distance >= S(-1) && distance < S(1) ? (distance < 0 ? S(1) : S(-1)) : S(0);
}

template <typename S>
__device__ __forceinline__ Axis<S> set_up_axis(S location, const Extent<S>& extent) {
  const S position = location * extent.size - extent.shift; // pixel centres at integers
  Axis<S> axis;
  axis.cell = fmin(fmax(floor(position), S(0)), extent.last); // 0 for NaN: always a cell
  axis.before = position - axis.cell;
  axis.after = axis.before - extent.next;
  axis.low = tent(axis.before);
  axis.high = tent(axis.after);
  return axis;
}

// One sample. Its four neighbours are numbered left to right, then top to bottom.
template <typename S>
struct Point {
  Axis<S> x, y;
  S attention;
  int row; // of the first neighbour in value
  S weight[4]; // bilinear weights times attention
};

template <typename S>
__device__ __forceinline__ Point<S> set_up_point(const Level<S>& level, Place<S> location, S attention) {
  Point<S> point;
  point.x = set_up_axis(location.x, level.x);
  point.y = set_up_axis(location.y, level.y);
  point.attention = attention;
  point.row = level.start + static_cast<int>(point.y.cell) * level.width + static_cast<int>(point.x.cell);
  const S top = attention * point.y.low, bottom = attention * point.y.high;
  point.weight[0] = top * point.x.low;
  point.weight[1] = top * point.x.high;
  point.weight[2] = bottom * point.x.low;
  point.weight[3] = bottom * point.x.high;
  return point;
}

template <typename S>
struct PointGradient {
  Place<S> location;
  S attention;
};

// `dots` are the products of the output's gradient with the four neighbours, summed over the channels.
template <typename S>
__device__ __forceinline__ PointGradient<S> point_gradient(const Level<S>& level, const Point<S>& point, const S (&dots)[4]) {
  const Axis<S>&x = point.x, &y = point.y;
  const S left = tent_slope(x.before), right = tent_slope(x.after);
  const S top = x.low * dots[0] + x.high * dots[1], bottom = x.low * dots[2] + x.high * dots[3];
  const S across = y.low * (left * dots[0] + right * dots[1]) + y.high * (left * dots[2] + right * dots[3]);
  const S down = tent_slope(y.before) * top + tent_slope(y.after) * bottom;
  PointGradient<S> gradient;
  gradient.location.x = point.attention * level.x.size * across;
  gradient.location.y = point.attention * level.y.size * down;
  gradient.attention = y.low * top + y.high * bottom;
  return gradient;
}

// Attention weights have the value's type T or, beside a half-precision value, float32 (`wide`).
template <typename T, typename S>
__device__ __forceinline__ S read_weight(const void* weights, int64_t index, bool wide) {
  if (std::is_same_v<T, S> || wide) {
    return static_cast<const S*>(weights)[index];
  }
  return static_cast<S>(static_cast<const T*>(weights)[index]);
}

template <typename T, typename S>
__device__ __forceinline__ void write_weight(void* weights, int64_t index, bool wide, S weight) {
  if (std::is_same_v<T, S> || wide) {
    static_cast<S*>(weights)[index] = weight;
  } else {
    static_cast<T*>(weights)[index] = static_cast<T>(weight);
  }
}

// What every kernel gets. All pointers are aligned to 16 bytes, all tensors contiguous; none but the gradients' is written.
template <typename T, typename S>
struct Inputs {
  const T* value; // (N, S, M, D)
  const Place<S>* locations; // (N, Lq, M, L, P)
  const void* weights; // (N, Lq, M, L, P)
  bool wide;
};

template <typename T, typename S>
struct Gradients {
  const T* output; // (N, Lq, M, D)
  S* value; // (N, S, M, D), zero at first
  Place<S>* locations;
  void* weights;
};

} // namespace vis::msda
