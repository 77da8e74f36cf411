// The op's CUDA kernels for PyTorch: checks, memory, launches. The kernels themselves are in the .cuh files beside this.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "ms_deform_attn.h"
#include "ms_deform_attn_dispatch.cuh"

namespace vis {

template <>
struct msda::IsBfloat16<c10::BFloat16> : std::true_type {};

namespace {

constexpr int64_t kAlignment = 16; // of the kernels' loads, in bytes

// The tensor itself where the kernels can read it, else a copy.
at::Tensor readable(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % kAlignment == 0 ? dense : dense.clone();
}

// Runs on the current stream of the current device; raises what the launch reports. Nothing waits for the device.
struct Launcher {
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, const Arguments&... arguments) const {
    kernel<<<grid, msda::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// Beyond what check_inputs asks of all devices. Sizes of a whole image or batch may exceed 32 bits; these do not in any use.
void check_limits(const at::Tensor& value, const Sizes& sizes) {
  constexpr int64_t limit = int64_t{1} << 31;
  TORCH_CHECK_VALUE(value.is_cuda(), "value lies on ", value.device(), ", expected a CUDA device");
  TORCH_CHECK_VALUE(
      sizes.levels <= msda::kMaxLevels, "there are ", sizes.levels, " levels, the CUDA kernels take ", msda::kMaxLevels);
  TORCH_CHECK_VALUE(
      sizes.rows < limit && sizes.points < limit - msda::kThreads && sizes.channels < limit - 4 * msda::kThreads &&
          sizes.heads < limit && sizes.heads * sizes.channels < limit / static_cast<int64_t>(sizeof(double)),
      "value is ", value.sizes(), " with ", sizes.points,
      " points: the CUDA kernels take fewer than 2^31 rows and points, and 2^28 elements in a row");
}

template <typename S>
msda::Problem<S> problem_of(const Sizes& sizes, at::IntArrayRef shapes, at::IntArrayRef starts) {
  return msda::make_problem<S>(
      sizes.images, sizes.rows, sizes.heads, sizes.channels, sizes.queries, sizes.levels, sizes.points, shapes.data(), starts.data());
}

// Calls run(T, S) with a T and S for the value's type and the arithmetic's.
template <typename Run>
void with_types(at::ScalarType type, const Run& run) {
  switch (type) {
    case at::kDouble:
      return run(double{}, double{});
    case at::kHalf:
      return run(c10::Half{}, float{});
    case at::kBFloat16:
      return run(c10::BFloat16{}, float{});
    default: // check_inputs has refused all others
      return run(float{}, float{});
  }
}

template <typename T, typename S>
msda::Inputs<T, S> inputs_of(const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights) {
  return {
      static_cast<const T*>(value.const_data_ptr()),
      static_cast<const msda::Place<S>*>(locations.const_data_ptr()),
      weights.const_data_ptr(),
      weights.scalar_type() != value.scalar_type()};
}

} // namespace

at::Tensor ms_deform_attn_cuda(
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, shapes, starts, locations, weights);
  check_limits(value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const int64_t expected[] = {sizes.images, sizes.queries, sizes.heads * sizes.channels};
  if (value.numel() == 0 || locations.numel() == 0) { // nothing to read, or nothing to write
    return at::zeros(at::IntArrayRef(expected, 3), value.options());
  }
  const at::Tensor output = at::empty(at::IntArrayRef(expected, 3), value.options());
  const at::Tensor source = readable(value), places = readable(locations), shares = readable(weights);
  with_types(value.scalar_type(), [&]<typename T, typename S>(T, S) {
    const auto problem = problem_of<S>(sizes, shapes, starts);
    msda::forward(problem, inputs_of<T, S>(source, places, shares), static_cast<T*>(output.mutable_data_ptr()), Launcher{});
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad,
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, shapes, starts, locations, weights);
  check_grad_output(grad, value, sizes);
  check_limits(value, sizes);
  at::globalContext().alertNotDeterministic("vis::ms_deform_attn_backward"); // atomic additions in any order
  const c10::cuda::CUDAGuard guard(value.device());
  constexpr auto dense = at::MemoryFormat::Contiguous;
  if (value.numel() == 0 || locations.numel() == 0) {
    return {at::zeros_like(value, dense), at::zeros_like(locations, dense), at::zeros_like(weights, dense)};
  }
  // Half precision would lose small addends, and its atomic additions are loops of compare-and-swap.
  const at::Tensor sum = at::zeros(value.sizes(), value.options().dtype(location_type(value.scalar_type())));
  const at::Tensor grad_locations = at::empty_like(locations, dense), grad_weights = at::empty_like(weights, dense);
  const at::Tensor source = readable(value), places = readable(locations), shares = readable(weights), upstream = readable(grad);
  with_types(value.scalar_type(), [&]<typename T, typename S>(T, S) {
    const msda::Gradients<T, S> gradients{
        static_cast<const T*>(upstream.const_data_ptr()),
        static_cast<S*>(sum.mutable_data_ptr()),
        static_cast<msda::Place<S>*>(grad_locations.mutable_data_ptr()),
        grad_weights.mutable_data_ptr()};
    msda::backward(problem_of<S>(sizes, shapes, starts), inputs_of<T, S>(source, places, shares), gradients, Launcher{});
  });
  return {sum.to(value.scalar_type()), grad_locations, grad_weights};
}

TORCH_LIBRARY_IMPL(vis, CUDA, m) {
  m.impl("ms_deform_attn", &ms_deform_attn_cuda);
  m.impl("ms_deform_attn_backward", &ms_deform_attn_backward_cuda);
}

} // namespace vis
