// Kernels for any number of channels and for double precision: one channel of a lane at a time, a power of two of lanes
// for a query and head. All indices have 64 bits.
//
// Bound by instructions: a lane moves one channel with each load (a sample costs about as many instructions for one
// channel as the other kernels spend on eight), and the backward reads the output's gradient again for every sample.
// They are for sizes that no released model has; the set-up of a sample is shared by the lanes here too.
#pragma once

#include "ms_deform_attn_point.cuh"

namespace vis::msda {

constexpr int kBlock = 4; // channels of a lane that are added up together

// Where the lanes of one query and head work; each group finds its own image.
struct AnyGroup {
  int lane, lanes;
  bool active; // false past the end: such lanes repeat the last pair, for the shuffles, and write nothing
  int64_t pair; // over all images
  int64_t value; // first channel of its head in its image's value

  template <typename S>
  __device__ __forceinline__ AnyGroup(const Problem<S>& problem, int lanes_of_group, int64_t block) {
    lanes = lanes_of_group;
    lane = threadIdx.x % lanes;
    const int64_t pairs = problem.images * problem.pairs;
    pair = block * (kThreads / lanes) + threadIdx.x / lanes;
    active = pair < pairs;
    pair = active ? pair : pairs - 1;
    value = (pair / problem.pairs * problem.rows * problem.heads + pair % problem.heads) * problem.channels;
  }
};

template <typename T, typename S>
__device__ __forceinline__ Point<S> own_point(
    const Problem<S>& problem, const Inputs<T, S>& inputs, const AnyGroup& group, const Level<S>& level, int64_t samples, int first) {
  const int64_t index = samples + min(first + group.lane, problem.points - 1);
  return set_up_point(level, inputs.locations[index], read_weight<T, S>(inputs.weights, index, inputs.wide));
}

// Sample `owner` of a round for all lanes: four weights, and the first channels of its neighbours.
template <typename S>
struct AnyShared {
  S weight[4];
  int64_t offset[4];

  __device__ __forceinline__ AnyShared(const Problem<S>& problem, const Level<S>& level, const AnyGroup& group, const Point<S>& own, int owner) {
    const int64_t row_channels = static_cast<int64_t>(problem.heads) * problem.channels;
    offset[0] = group.value + __shfl_sync(kWarp, own.row, owner, group.lanes) * row_channels;
    offset[1] = offset[0] + level.right * row_channels;
    offset[2] = offset[0] + level.below * row_channels;
    offset[3] = offset[1] + level.below * row_channels;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weight[k] = __shfl_sync(kWarp, own.weight[k], owner, group.lanes);
    }
  }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 4) forward_generic(const Problem<S> problem, const Inputs<T, S> inputs, int lanes, int64_t blocks, T* __restrict__ output) {
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const AnyGroup group(problem, lanes, block);
    for (int begin = 0; begin < problem.channels; begin += kBlock * lanes) { // few channels at a time: registers
      int64_t samples = group.pair * problem.levels * problem.points;
      S total[kBlock] = {};
      for (int l = 0; l < problem.levels; ++l) {
        const Level<S>& level = problem.level[l];
        for (int first = 0; first < problem.points; first += lanes) {
          const Point<S> own = own_point(problem, inputs, group, level, samples, first);
          const int count = min(lanes, problem.points - first);
          for (int j = 0; j < count; ++j) {
            const AnyShared<S> point(problem, level, group, own, j);
#pragma unroll
            for (int i = 0; i < kBlock; ++i) {
              const int channel = begin + i * lanes + group.lane;
              if (channel < problem.channels) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                  total[i] += point.weight[k] * static_cast<S>(inputs.value[point.offset[k] + channel]);
                }
              }
            }
          }
        }
        samples += problem.points;
      }
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const int channel = begin + i * lanes + group.lane;
        if (group.active && channel < problem.channels) {
          output[group.pair * problem.channels + channel] = static_cast<T>(total[i]);
        }
      }
    }
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 4) backward_generic(const Problem<S> problem, const Inputs<T, S> inputs, const Gradients<T, S> gradients, int lanes, int64_t blocks) {
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const AnyGroup group(problem, lanes, block);
    const T* grad_output = gradients.output + group.pair * problem.channels;
    int64_t samples = group.pair * problem.levels * problem.points;
    for (int l = 0; l < problem.levels; ++l) {
      const Level<S>& level = problem.level[l];
      for (int first = 0; first < problem.points; first += lanes) {
        const Point<S> own = own_point(problem, inputs, group, level, samples, first);
        S sums[4] = {};
        const int count = min(lanes, problem.points - first);
        for (int j = 0; j < count; ++j) {
          const AnyShared<S> point(problem, level, group, own, j);
          S dots[4] = {};
          for (int channel = group.lane; channel < problem.channels; channel += lanes) {
            const S gradient = static_cast<S>(grad_output[channel]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              dots[k] += gradient * static_cast<S>(inputs.value[point.offset[k] + channel]);
              if (group.active && point.weight[k] != 0) { // NaN goes through
                atomicAdd(gradients.value + point.offset[k] + channel, point.weight[k] * gradient);
              }
            }
          }
          for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              dots[k] += __shfl_xor_sync(kWarp, dots[k], offset);
            }
          }
          if (group.lane == j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sums[k] = dots[k];
            }
          }
        }
        if (group.active && group.lane < count) {
          const PointGradient<S> result = point_gradient(level, own, sums);
          gradients.locations[samples + first + group.lane] = result.location;
          write_weight<T, S>(gradients.weights, samples + first + group.lane, inputs.wide, result.attention);
        }
      }
      samples += problem.points;
    }
  }
}

} // namespace vis::msda
