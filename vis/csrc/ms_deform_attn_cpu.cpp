// CPU kernels of vis::ms_deform_attn: float32 and float64; half-precision inputs are computed in float32.
#include "ms_deform_attn_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <string>

#define VIS_ISA any_cpu
#define VIS_TARGET
#define VIS_BYTES 16
#include "ms_deform_attn_cpu_kernels.h"
#undef VIS_ISA
#undef VIS_TARGET
#undef VIS_BYTES

#if defined(__x86_64__)
#define VIS_ISA avx2
#define VIS_TARGET __attribute__((target("avx2,fma")))
#define VIS_BYTES 32
#include "ms_deform_attn_cpu_kernels.h"
#undef VIS_ISA
#undef VIS_TARGET
#undef VIS_BYTES

#define VIS_ISA avx512
#define VIS_TARGET __attribute__((target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")))
#define VIS_BYTES 64
#include "ms_deform_attn_cpu_kernels.h"
#undef VIS_ISA
#undef VIS_TARGET
#undef VIS_BYTES
#endif

namespace vis {
namespace {

// The kernels for this machine, by the same rule as torch's own (ATEN_CPU_CAPABILITY overrides it).
template <typename T>
Kernels<T> kernels_here() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return avx512::kernels<T>();
  }
  if (capability == "AVX2") {
    return avx2::kernels<T>();
  }
#endif
  return any_cpu::kernels<T>();
}

int64_t blocks_of(int64_t queries) {
  return (queries + QUERIES - 1) / QUERIES;
}

void check_size(const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      sizes.rows <= std::numeric_limits<int32_t>::max(),
      "value has ", sizes.rows, " rows, the CPU kernels number them in 32 bits");
}

template <typename T>
void run_forward(const Arrays<T>& arrays, at::IntArrayRef shapes, at::IntArrayRef starts) {
  const Sizes& sizes = arrays.sizes;
  const int64_t blocks = blocks_of(sizes.queries), total = sizes.images * sizes.heads * blocks;
  const int64_t block_work = 4 * QUERIES * (sizes.samples() + 1) * sizes.channels;
  constexpr int64_t worth_a_thread = 1 << 16; // multiplications
  const auto kernel = kernels_here<T>().forward;
  at::parallel_for(0, total, 1 + worth_a_thread / (block_work + 1), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(sizes, shapes, starts);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / blocks, first = i % blocks * QUERIES;
      const Block<T> block{
          pair / sizes.heads, pair % sizes.heads, first, std::min(first + QUERIES, sizes.queries), nullptr};
      kernel(arrays, scratch, block);
    }
  });
}

// No two threads add to the same place: a thread has whole heads of images and, where there are more threads than
// heads, one of `parts` copies of the gradient for its part of the queries. The order of the additions is therefore
// fixed, for a given number of threads.
template <typename T>
void run_backward(
    const Arrays<T>& arrays, at::IntArrayRef shapes, at::IntArrayRef starts, T* grad_value, int64_t parts) {
  const Sizes& sizes = arrays.sizes;
  const int64_t blocks = blocks_of(sizes.queries), pairs = sizes.images * sizes.heads;
  const int64_t size = pairs * sizes.rows * sizes.channels;
  const auto kernel = kernels_here<T>().backward;
  at::parallel_for(0, parts * pairs, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(sizes, shapes, starts);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / pairs, pair = i % pairs;
      for (int64_t b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) {
        const Block<T> block{
            pair / sizes.heads,
            pair % sizes.heads,
            b * QUERIES,
            std::min((b + 1) * QUERIES, sizes.queries),
            grad_value + part * size};
        kernel(arrays, scratch, block);
      }
    }
  });
}

int64_t parts_for(const Sizes& sizes) {
  const int64_t pairs = std::max<int64_t>(sizes.images * sizes.heads, 1);
  const int64_t wanted = (at::get_num_threads() + pairs - 1) / pairs;
  return std::max<int64_t>(1, std::min(wanted, blocks_of(sizes.queries)));
}

at::ScalarType computed_in(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename T>
Arrays<T> arrays_of(
    const Sizes& sizes, const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights) {
  return {
      sizes,
      value.const_data_ptr<T>(),
      locations.const_data_ptr<T>(),
      weights.const_data_ptr<T>(),
      nullptr,
      nullptr,
      nullptr,
      nullptr};
}

template <typename T>
at::Tensor forward_as(
    const Sizes& sizes,
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  at::Tensor out = at::empty({sizes.images, sizes.queries, sizes.heads * sizes.channels}, value.options());
  auto arrays = arrays_of<T>(sizes, value, locations, weights);
  arrays.out = out.mutable_data_ptr<T>();
  run_forward<T>(arrays, shapes, starts);
  return out;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_as(
    const Sizes& sizes,
    const at::Tensor& grad,
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const int64_t parts = parts_for(sizes);
  at::Tensor grad_value =
      at::zeros({parts, sizes.images, sizes.rows, sizes.heads, sizes.channels}, value.options());
  at::Tensor grad_locations = at::empty_like(locations), grad_weights = at::empty_like(weights);
  auto arrays = arrays_of<T>(sizes, value, locations, weights);
  arrays.grad_out = grad.const_data_ptr<T>();
  arrays.grad_locations = grad_locations.mutable_data_ptr<T>();
  arrays.grad_weights = grad_weights.mutable_data_ptr<T>();
  run_backward<T>(arrays, shapes, starts, grad_value.mutable_data_ptr<T>(), parts);
  return {parts == 1 ? grad_value.squeeze(0) : grad_value.sum(0), grad_locations, grad_weights};
}

} // namespace

at::Tensor ms_deform_attn_cpu(
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, shapes, starts, locations, weights);
  check_size(sizes);
  const auto type = computed_in(value);
  const auto run = type == at::kDouble ? &forward_as<double> : &forward_as<float>;
  return run(
             sizes, value.to(type).contiguous(), shapes, starts, locations.contiguous(), weights.to(type).contiguous())
      .to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad,
    const at::Tensor& value,
    at::IntArrayRef shapes,
    at::IntArrayRef starts,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, shapes, starts, locations, weights);
  check_grad_output(grad, value, sizes);
  check_size(sizes);
  const auto type = computed_in(value);
  const auto run = type == at::kDouble ? &backward_as<double> : &backward_as<float>;
  auto [grad_value, grad_locations, grad_weights] = run(
      sizes,
      grad.to(type).contiguous(),
      value.to(type).contiguous(),
      shapes,
      starts,
      locations.contiguous(),
      weights.to(type).contiguous());
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights.to(weights.scalar_type())};
}

} // namespace vis

TORCH_LIBRARY_IMPL(vis, CPU, m) {
  m.impl("ms_deform_attn", &vis::ms_deform_attn_cpu);
  m.impl("ms_deform_attn_backward", &vis::ms_deform_attn_backward_cpu);
}
