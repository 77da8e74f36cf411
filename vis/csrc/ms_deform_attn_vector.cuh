// Kernels for 32 and 64 channels in float32, float16 and bfloat16: eight channels of a lane, four or eight lanes of a head.
//
// What bounds them. Warp instructions for one query with 8 heads of 32 channels and 3 x 4 samples, one warp's work,
// counted in the machine code of nvcc 13.0 (one thread for each channel takes 9,064 / 9,664 and 27,544 / 27,928):
//
//                          sm_80   sm_90
//     forward, float32     1,023   1,000   of a sample's 54: 32 FFMA, 8 LDG.128, 5 SHFL, 9 for addresses
//     forward, bfloat16    1,375   1,360   4 LDG.128, but 32 to widen
//     backward, float32    2,476   2,212   32 FFMA, 32 FMUL, 8 LDG.128; 32 RED on sm_80, 8 REDG.F32x4 on sm_90
//     backward, bfloat16   2,932   2,646
//
// The encoder of a 384x640 image has 5,040 queries. An H200 (132 SMs of 4 instructions and 128 bytes of L1 a clock,
// 1.83 GHz) issues the forward in 5.2 us (float32) or 7.1 us (bfloat16), and L1 delivers the 4 x 12 x 8 cells of a query
// in 8.0 or 4.0 us: float32 is bound by L1, bfloat16 by instructions; the memory would need 3.4 or 2.1 us. On an A100
// (108 SMs, 1.41 GHz) it is 8.5 and 12.7 us, 11.4 and 6.4 us. At 736x1280, 19,320 queries, all of it is 3.8 times that.
// Value fits the L2 cache; a larger share of hits in L1 would need queries that are tiled in two dimensions, which the
// op does not know of.
// The backward's instructions take 11.5 us (H200) or 20.5 us (A100) in float32. Its 248 MB of additions into a gradient
// of 5.2 MB are probably its bound, at the rate of the L2 cache's atomic units, which is not published.
// These are sums on paper: tools/gpu_check.sh measures.
#pragma once

#include "ms_deform_attn_point.cuh"

// REDG.F32x4 exists from sm_90 on.
#if !defined(VIS_VECTOR_ATOMICS) && defined(__CUDA_ARCH__)
#define VIS_VECTOR_ATOMICS (__CUDA_ARCH__ >= 900)
#endif

namespace vis::msda {

constexpr int kChannels = 8; // of a lane
constexpr int kRound = 4; // samples whose set-up the lanes of a pair share out; all are of one level

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

// Specialised where T has the upper half of a float's bits.
template <typename T>
struct IsBfloat16 : std::false_type {};

template <typename T, int n>
__device__ __forceinline__ void widen(const Pack<T, n>& pack, float* channels) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    channels[i] = static_cast<float>(pack.at[i]);
  }
}

// One instruction for each bfloat16; through 16-bit registers the compiler needs two.
template <int n>
__device__ __forceinline__ void widen_bfloat16(const Pack<uint32_t, n>& pack, float* channels) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    channels[2 * i] = __uint_as_float(pack.at[i] << 16);
    channels[2 * i + 1] = __uint_as_float(pack.at[i] & 0xffff0000u);
  }
}

// Elements of T in 128 bits. A lane holds channels `k * kLanes * width + lane * width + i`, so that a load of all lanes
// covers whole 32-byte sectors.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// `first`: the lane's first channel.
template <typename T, int kLanes, int kAccess = kWidth<T>>
__device__ __forceinline__ void read_lane(const T* first, float (&channels)[kChannels]) {
#pragma unroll
  for (int k = 0; k < kChannels; k += kAccess) {
    if constexpr (IsBfloat16<T>::value && kAccess % 2 == 0) {
      const auto pack = *reinterpret_cast<const Pack<uint32_t, kAccess / 2>*>(first + k * kLanes); // one load
      widen_bfloat16(pack, channels + k);
    } else {
      const auto pack = *reinterpret_cast<const Pack<T, kAccess>*>(first + k * kLanes);
      widen(pack, channels + k);
    }
  }
}

template <typename T, int kLanes>
__device__ __forceinline__ void write_lane(T* first, const float (&channels)[kChannels]) {
  constexpr int width = kWidth<T>;
#pragma unroll
  for (int k = 0; k < kChannels; k += width) {
    Pack<T, width> pack;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      pack.at[i] = static_cast<T>(channels[k + i]);
    }
    *reinterpret_cast<Pack<T, width>*>(first + k * kLanes) = pack;
  }
}

// Where the lanes of one pair work. The pairs of a block are of one image.
template <int kLanes>
struct Group {
  static constexpr int kPairs = kThreads / kLanes; // of a block
  static constexpr int kOwners = kLanes / kRound; // lanes that know a sample; the first of them writes its gradients
  int lane, own; // `own`: which of the samples of a round is set up here
  bool active; // false past the last pair: such lanes repeat it, for the shuffles, and write nothing
  uint32_t pair; // within the image

  __device__ __forceinline__ explicit Group(const Problem<float>& problem) {
    lane = threadIdx.x % kLanes;
    own = lane / kOwners;
    pair = blockIdx.x * kPairs + threadIdx.x / kLanes;
    active = pair < problem.pairs;
    pair = active ? pair : static_cast<uint32_t>(problem.pairs) - 1;
  }
};

// A sample as its owner set it up, for all lanes of the pair: five shuffles.
template <int kLanes>
struct Shared {
  float weight[4];
  int row;

  __device__ __forceinline__ Shared(const Point<float>& own, int index) {
    const int owner = index * Group<kLanes>::kOwners;
    row = __shfl_sync(kWarp, own.row, owner, kLanes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weight[k] = __shfl_sync(kWarp, own.weight[k], owner, kLanes);
    }
  }
};

// `pair` of `image` -> the first of its samples.
__device__ __forceinline__ int64_t first_sample(const Problem<float>& problem, int64_t image, uint32_t pair) {
  return (image * problem.pairs + pair) * problem.levels * problem.points;
}

// The own sample of a round that begins at `first` of a level; past the last sample of the level, that one again.
template <typename T, int kLanes>
__device__ __forceinline__ Point<float> own_point(
    const Problem<float>& problem, const Inputs<T, float>& inputs, const Group<kLanes>& group, const Level<float>& level,
    int64_t samples, int first) {
  const int64_t index = samples + min(first + group.own, problem.points - 1);
  return set_up_point(level, inputs.locations[index], read_weight<T, float>(inputs.weights, index, inputs.wide));
}

// From a sample's first neighbour to each of the four, in bytes, and from row to row. A lane's address is then one
// 32x32+64-bit multiplication and addition for the first neighbour and one 64-bit addition for each of the others.
struct Steps {
  int row;
  int64_t at[4];

  __device__ __forceinline__ Steps(const Level<float>& level, int row_bytes) : row(row_bytes) {
    const int64_t right = static_cast<int64_t>(level.right) * row_bytes, below = static_cast<int64_t>(level.below) * row_bytes;
    at[0] = 0;
    at[1] = right;
    at[2] = below;
    at[3] = right + below;
  }
};

template <typename T>
__device__ __forceinline__ T* moved(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// `value`: the lane's first channel in the image's first row.
template <typename T, int kLanes>
__device__ __forceinline__ void gather(const T* value, const Steps& steps, const Shared<kLanes>& point, float (&total)[kChannels]) {
  const T* first = moved(value, static_cast<int64_t>(point.row) * steps.row);
  float cell[4][kChannels];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    read_lane<T, kLanes>(moved(first, steps.at[k]), cell[k]);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      total[i] += point.weight[k] * cell[k][i];
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 8)
    forward_vector(const Problem<float> problem, const Inputs<T, float> inputs, T* __restrict__ output) {
  const Group<kLanes> group(problem);
  const int lane = group.lane * kWidth<T>, row_channels = problem.heads * kLanes * kChannels;
  const int64_t source = static_cast<int64_t>(group.pair % problem.heads) * kLanes * kChannels + lane;
  const int64_t image = blockIdx.y;
  const T* value = inputs.value + image * problem.rows * row_channels + source;
  int64_t samples = first_sample(problem, image, group.pair);
  float total[kChannels] = {};
  for (int l = 0; l < problem.levels; ++l) {
    const Level<float>& level = problem.level[l];
    const Steps steps(level, row_channels * static_cast<int>(sizeof(T)));
    for (int first = 0; first < problem.points; first += kRound) {
      const Point<float> own = own_point<T, kLanes>(problem, inputs, group, level, samples, first);
      const int left = problem.points - first;
      if (left >= kRound) { // without tests between the samples, so that their loads are in flight together
#pragma unroll
        for (int j = 0; j < kRound; ++j) {
          gather<T, kLanes>(value, steps, Shared<kLanes>(own, j), total);
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < left; ++j) {
          gather<T, kLanes>(value, steps, Shared<kLanes>(own, j), total);
        }
      }
    }
    samples += problem.points;
  }
  if (group.active) {
    write_lane<T, kLanes>(output + (image * problem.pairs + group.pair) * kLanes * kChannels + lane, total);
  }
}

// Sums over the lanes of a pair, each to the lanes that own the sample: the first two steps halve the number of sums,
// so that 4 samples with 4 sums each take 12 shuffles (kLanes 4) or 16 (kLanes 8), not 32 or 48.
template <int kLanes>
__device__ __forceinline__ void reduce_to_owners(const float (&sums)[kRound][4], int lane, float (&own)[4]) {
  const bool upper = lane & (kLanes / 2), odd = lane & (kLanes / 4);
  float half[2][4];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float kept = upper ? sums[j + 2][k] : sums[j][k], sent = upper ? sums[j][k] : sums[j + 2][k];
      half[j][k] = kept + __shfl_xor_sync(kWarp, sent, kLanes / 2);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float kept = odd ? half[1][k] : half[0][k], sent = odd ? half[0][k] : half[1][k];
    own[k] = kept + __shfl_xor_sync(kWarp, sent, kLanes / 4);
  }
#pragma unroll
  for (int offset = kLanes / 8; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      own[k] += __shfl_xor_sync(kWarp, own[k], offset);
    }
  }
}

// Channels of a lane in atomic additions: four neighbours where they go in one instruction, else the lanes side by side.
#if VIS_VECTOR_ATOMICS
constexpr int kScatter = 4;
#else
constexpr int kScatter = 1;
#endif

// `first`: the lane's first channel.
template <int kLanes>
__device__ __forceinline__ void scatter(float* first, float weight, const float (&gradient)[kChannels]) {
#pragma unroll
  for (int k = 0; k < kChannels; k += kScatter) {
#if VIS_VECTOR_ATOMICS
    const float4 addend = make_float4(weight * gradient[k], weight * gradient[k + 1], weight * gradient[k + 2], weight * gradient[k + 3]);
    atomicAdd(reinterpret_cast<float4*>(first + k * kLanes), addend);
#else
    atomicAdd(first + k * kLanes, weight * gradient[k]);
#endif
  }
}

// The lane's part of one sample: products with the neighbours, and their gradients. `value` and `grad_value`: the lane's
// first channels in the image's first row; `gradient` and `scattered`: its channels of the output's gradient, in the
// order of the loads and in that of the atomic additions.
template <typename T, int kLanes>
__device__ __forceinline__ void push(
    const T* value, float* grad_value, const Steps& load, const Steps& add, const Shared<kLanes>& point,
    const float (&gradient)[kChannels], const float (&scattered)[kChannels], float (&dots)[4]) {
  const T* first = moved(value, static_cast<int64_t>(point.row) * load.row);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float cell[kChannels];
    read_lane<T, kLanes>(moved(first, load.at[k]), cell);
    dots[k] = 0;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      dots[k] += gradient[i] * cell[i];
    }
  }
  float* target = moved(grad_value, static_cast<int64_t>(point.row) * add.row);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (point.weight[k] != 0) { // NaN goes through
      scatter<kLanes>(moved(target, add.at[k]), point.weight[k], scattered);
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 5)
    backward_vector(const Problem<float> problem, const Inputs<T, float> inputs, const Gradients<T, float> gradients) {
  const Group<kLanes> group(problem);
  const int load = group.lane * kWidth<T>, add = group.lane * kScatter, row_channels = problem.heads * kLanes * kChannels;
  const int64_t head = static_cast<int64_t>(group.pair % problem.heads) * kLanes * kChannels;
  const int64_t image = blockIdx.y;
  const T* value = inputs.value + image * problem.rows * row_channels + head + load;
  float* grad_value = gradients.value + image * problem.rows * row_channels + head + add;
  const T* grad_output = gradients.output + (image * problem.pairs + group.pair) * kLanes * kChannels;
  int64_t samples = first_sample(problem, image, group.pair);
  float gradient[kChannels], scattered[kChannels];
  read_lane<T, kLanes>(grad_output + load, gradient);
  read_lane<T, kLanes, kScatter>(grad_output + add, scattered);
  for (int l = 0; l < problem.levels; ++l) {
    const Level<float>& level = problem.level[l];
    const Steps loads(level, row_channels * static_cast<int>(sizeof(T))), adds(level, row_channels * static_cast<int>(sizeof(float)));
    for (int first = 0; first < problem.points; first += kRound) {
      Point<float> own = own_point<T, kLanes>(problem, inputs, group, level, samples, first);
      if (!group.active) {
        own.weight[0] = own.weight[1] = own.weight[2] = own.weight[3] = 0;
      }
      const int left = problem.points - first;
      float dots[kRound][4];
#pragma unroll
      for (int j = 0; j < kRound; ++j) {
        if (j < left) { // the same for all threads
          push<T, kLanes>(value, grad_value, loads, adds, Shared<kLanes>(own, j), gradient, scattered, dots[j]);
        } else {
          dots[j][0] = dots[j][1] = dots[j][2] = dots[j][3] = 0;
        }
      }
      float sums[4];
      reduce_to_owners<kLanes>(dots, group.lane, sums);
      if (group.active && group.own < left && group.lane % Group<kLanes>::kOwners == 0) {
        const PointGradient<float> result = point_gradient(level, own, sums);
        gradients.locations[samples + first + group.own] = result.location;
        write_weight<T, float>(gradients.weights, samples + first + group.own, inputs.wide, result.attention);
      }
    }
    samples += problem.points;
  }
}

} // namespace vis::msda
