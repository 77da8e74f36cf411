// What the CPU kernels work on. One block is up to QUERIES queries of one head of one image: its samples are set up
// together, so that the compiler vectorises that over samples; the channels of a sample then share the set-up.
#pragma once

#include "ms_deform_attn.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace vis {

constexpr int64_t QUERIES = 16;

// Contiguous arrays of one call. What only the backward pass has is null in the forward pass, and the other way round.
template <typename T>
struct Arrays {
  Sizes sizes;
  const T* value;
  const T* locations;
  const T* weights;
  T* out;
  const T* grad_out;
  T* grad_locations;
  T* grad_weights;
};

template <typename T>
struct Block {
  int64_t image, head, first, last; // queries first..last-1
  T* grad_value; // where this block adds its share: (N, S, M, D)
};

// Memory of one thread: for each sample of a block its level, its position and its four neighbours.
template <typename T>
class Scratch {
 public:
  Scratch(const Sizes& sizes, at::IntArrayRef shapes, at::IntArrayRef starts)
      : count_(QUERIES * sizes.samples()), numbers_(15 * count_), integers_(9 * count_) {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t level = i % sizes.samples() / sizes.points;
      rows()[i] = static_cast<int32_t>(shapes[2 * level]);
      columns()[i] = static_cast<int32_t>(shapes[2 * level + 1]);
      start()[i] = static_cast<int32_t>(starts[level]);
      height()[i] = static_cast<T>(shapes[2 * level]);
      width()[i] = static_cast<T>(shapes[2 * level + 1]);
    }
  }

  T* height() { return number(0); }
  T* width() { return number(1); }
  T* x() { return number(2); }
  T* y() { return number(3); }
  T* attention() { return number(4); }
  // Shares of the left column and of the upper line; those of their neighbours are 1 minus that, or 0 outside.
  T* left() { return number(5); }
  T* upper() { return number(6); }
  // Of the four neighbours upper left, upper right, lower left, lower right: share times attention weight ...
  T* share(int corner) { return number(7 + corner); }
  // ... and, in the backward pass, the product of the neighbour's features with the gradient.
  T* product(int corner) { return number(11 + corner); }

  int32_t* rows() { return integer(0); }
  int32_t* columns() { return integer(1); }
  int32_t* start() { return integer(2); }
  // The column and the line of the upper left neighbour.
  int32_t* column() { return integer(3); }
  int32_t* line() { return integer(4); }
  // The row of a neighbour in (S, M, D), or -1 outside of its level.
  int32_t* row(int corner) { return integer(5 + corner); }

 private:
  T* number(int i) { return numbers_.data() + i * count_; }
  int32_t* integer(int i) { return integers_.data() + i * count_; }

  int64_t count_;
  std::vector<T> numbers_;
  std::vector<int32_t> integers_;
};

template <typename T>
struct Kernels {
  void (*forward)(const Arrays<T>&, Scratch<T>&, const Block<T>&);
  void (*backward)(const Arrays<T>&, Scratch<T>&, const Block<T>&);
};

} // namespace vis
