// Chooses and sizes the kernels. `launch(kernel, grid, arguments...)` runs one: on a device, or emulated in the tests.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ms_deform_attn_generic.cuh"
#include "ms_deform_attn_vector.cuh"

namespace vis::msda {

template <typename S>
Extent<S> make_extent(int64_t size) {
  constexpr S far = S(1e30);
  return {S(size), size > 0 ? S(0.5) : far, size > 1 ? S(size - 2) : S(0), size > 1 ? S(1) : far};
}

// `shapes` h0, w0, h1, w1, ...; `starts` first rows; both of `levels` levels.
template <typename S>
Problem<S> make_problem(
    int64_t images, int64_t rows, int64_t heads, int64_t channels, int64_t queries, int64_t levels, int64_t points,
    const int64_t* shapes, const int64_t* starts) {
  Problem<S> problem = {};
  problem.images = images;
  problem.pairs = queries * heads;
  problem.rows = rows;
  problem.heads = static_cast<int>(heads);
  problem.channels = static_cast<int>(channels);
  problem.levels = static_cast<int>(levels);
  problem.points = static_cast<int>(points);
  for (int l = 0; l < problem.levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    Level<S>& level = problem.level[l];
    if (height == 0 || width == 0) { // no weights, and loads from the first row
      level = {make_extent<S>(0), make_extent<S>(0), 0, 0, 0, 0};
    } else {
      const int line = static_cast<int>(width);
      level = {make_extent<S>(width), make_extent<S>(height), static_cast<int>(starts[l]), line, width > 1 ? 1 : 0, height > 1 ? line : 0};
    }
  }
  return problem;
}

// Lanes of a query and head in the kernels of ms_deform_attn_vector.cuh; 0: those of ms_deform_attn_generic.cuh, whose
// indices have 64 bits everywhere. The former count the pairs of an image with 32, and have one image in a line of blocks.
template <typename S>
int vector_lanes(const Problem<S>& problem) {
  const bool narrow = problem.pairs < (int64_t{1} << 31) && problem.images < 65536;
  const bool fits = std::is_same_v<S, float> && narrow && (problem.channels == 32 || problem.channels == 64);
  return fits ? problem.channels / kChannels : 0;
}

// Tiles of pairs in x, images in y: no block spans two images.
template <typename S>
dim3 vector_grid(const Problem<S>& problem, int lanes) {
  const int64_t pairs = kThreads / lanes;
  return dim3(static_cast<unsigned>((problem.pairs + pairs - 1) / pairs), static_cast<unsigned>(problem.images));
}

struct GenericShape {
  int lanes = 1; // the power of two that holds all channels, up to a warp
  int64_t blocks; // of work; blocks past the limit of the grid are looped over
  dim3 grid;

  template <typename S>
  explicit GenericShape(const Problem<S>& problem) {
    while (lanes < 32 && lanes < problem.channels) {
      lanes *= 2;
    }
    const int64_t pairs = kThreads / lanes;
    blocks = (problem.images * problem.pairs + pairs - 1) / pairs;
    grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
  }
};

template <typename T, typename S, typename Launch>
void forward(const Problem<S>& problem, const Inputs<T, S>& inputs, T* output, const Launch& launch) {
  if constexpr (std::is_same_v<S, float>) {
    if (const int lanes = vector_lanes<S>(problem)) {
      launch(lanes == 4 ? forward_vector<T, 4> : forward_vector<T, 8>, vector_grid(problem, lanes), problem, inputs, output);
      return;
    }
  }
  const GenericShape shape(problem);
  launch(forward_generic<T, S>, shape.grid, problem, inputs, shape.lanes, shape.blocks, output);
}

template <typename T, typename S, typename Launch>
void backward(const Problem<S>& problem, const Inputs<T, S>& inputs, const Gradients<T, S>& gradients, const Launch& launch) {
  if constexpr (std::is_same_v<S, float>) {
    if (const int lanes = vector_lanes<S>(problem)) {
      launch(lanes == 4 ? backward_vector<T, 4> : backward_vector<T, 8>, vector_grid(problem, lanes), problem, inputs, gradients);
      return;
    }
  }
  const GenericShape shape(problem);
  launch(backward_generic<T, S>, shape.grid, problem, inputs, gradients, shape.lanes, shape.blocks);
}

} // namespace vis::msda
