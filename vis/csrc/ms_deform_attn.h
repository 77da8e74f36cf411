// Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, section 4.1): what the kernels of all
// devices share. Included by C++ and CUDA sources; it needs ATen's core headers only, so that it compiles in seconds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <tuple>

namespace vis {

// The seven sizes of a call.
struct Sizes {
  int64_t images, rows, heads, channels, queries, levels, points;

  // Samples of one query and head.
  int64_t samples() const {
    return levels * points;
  }
};

// Positions are float32 unless everything is float64: half precision errs by more than a pixel.
inline at::ScalarType location_type(at::ScalarType value_type) {
  return value_type == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_half(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16;
}

// Raises ValueError unless the arguments fit one another:
//   value (N, S, M, D) float32, float64, float16 or bfloat16; shapes h0, w0, h1, w1, ...; starts (L,), first row of each level;
//   locations (N, Lq, M, L, P, 2) as (x, y) in 0..1, of location_type; weights (N, Lq, M, L, P) as value, or float32
//   beside a half-precision value. Nothing is read from a device.
inline Sizes check_inputs(
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  TORCH_CHECK_VALUE(
      value.dim() == 4 && locations.dim() == 6,
      "value is ", value.sizes(), " and sampling_locations ", locations.sizes(),
      ", expected (N, S, M, D) and (N, Lq, M, L, P, 2)");
  const auto levels = static_cast<int64_t>(starts.size());
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(shapes.size()) == 2 * levels,
      "spatial_shapes has ", shapes.size(), " numbers, expected h and w of each of the ", levels, " levels");
  const Sizes sizes{
      value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), levels, locations.size(4)};
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1], start = starts[level];
    // Sizes beyond 2^31 would overflow the product; no level of that size fits into S anyway.
    const bool fits = height >= 0 && width >= 0 && height < (int64_t{1} << 31) && width < (int64_t{1} << 31) &&
        start >= 0 && start <= sizes.rows && height * width <= sizes.rows - start;
    TORCH_CHECK_VALUE(
        fits, "level ", level, " of ", height, " x ", width, " from row ", start, " does not lie in the ", sizes.rows,
        " rows of value");
  }
  const int64_t expected[] = {sizes.images, sizes.queries, sizes.heads, levels, sizes.points, 2};
  TORCH_CHECK_VALUE(
      locations.sizes() == at::IntArrayRef(expected, 6),
      "sampling_locations is ", locations.sizes(), ", expected (N, Lq, M, L, P, 2) = ", at::IntArrayRef(expected, 6));
  TORCH_CHECK_VALUE(
      weights.sizes() == at::IntArrayRef(expected, 5),
      "attention_weights is ", weights.sizes(), ", expected (N, Lq, M, L, P) = ", at::IntArrayRef(expected, 5));

  const auto type = value.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kDouble || is_half(type),
      "value is ", type, ", expected float32, float64, float16 or bfloat16");
  TORCH_CHECK_VALUE(
      locations.scalar_type() == location_type(type),
      "sampling_locations are ", locations.scalar_type(), ", expected ", location_type(type), " beside a value in ", type);
  TORCH_CHECK_VALUE(
      weights.scalar_type() == type || (is_half(type) && weights.scalar_type() == at::kFloat),
      "attention_weights are ", weights.scalar_type(), ", expected ", type,
      is_half(type) ? " or Float" : "", " beside a value in ", type);
  TORCH_CHECK_VALUE(
      locations.device() == value.device() && weights.device() == value.device(),
      "value lies on ", value.device(), ", sampling_locations on ", locations.device(), " and attention_weights on ",
      weights.device(), ", expected one device");
  return sizes;
}

// Raises ValueError unless `grad` (N, Lq, M*D) is the gradient of an output.
inline void check_grad_output(const at::Tensor& grad, const at::Tensor& value, const Sizes& sizes) {
  const int64_t expected[] = {sizes.images, sizes.queries, sizes.heads * sizes.channels};
  TORCH_CHECK_VALUE(
      grad.sizes() == at::IntArrayRef(expected, 3) && grad.scalar_type() == value.scalar_type() &&
          grad.device() == value.device(),
      "grad_output is ", grad.sizes(), " in ", grad.scalar_type(), " on ", grad.device(), ", expected (N, Lq, M*D) = ",
      at::IntArrayRef(expected, 3), " in ", value.scalar_type(), " on ", value.device());
}

at::Tensor ms_deform_attn_cpu(
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights);

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad,
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights);

at::Tensor ms_deform_attn_cuda(
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights);

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad,
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights);

} // namespace vis
