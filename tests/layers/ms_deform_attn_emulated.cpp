// The CUDA kernels of deformable attention under emulation, behind plain C functions. See test_ms_deform_attn_emulated.py.
#include "cuda_emulation.h"

#include "../../vis/csrc/ms_deform_attn_dispatch.cuh"

namespace {

// bfloat16, rounded to nearest even.
struct Bfloat16 {
  uint16_t bits;

  explicit Bfloat16(float value) {
    uint32_t all;
    std::memcpy(&all, &value, sizeof(all));
    bits = value != value ? 0x7fc0 : static_cast<uint16_t>((all + 0x7fff + ((all >> 16) & 1)) >> 16);
  }
  Bfloat16() = default;

  explicit operator float() const {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

using Half = _Float16;

struct Launcher {
  template <typename Kernel, typename... Arguments>
  void operator()(Kernel* kernel, dim3 grid, const Arguments&... arguments) const {
    emulation::launch(kernel, grid, vis::msda::kThreads, arguments...);
  }
};

// Tensors and sizes of a call, as Python lays them out.
struct Call {
  const void *grad, *value, *locations, *weights;
  void *output, *grad_value, *grad_locations, *grad_weights;
  const int64_t *shapes, *starts;
  int64_t images, rows, heads, channels, queries, levels, points, wide;
};

template <typename T, typename S>
int run(const Call& call, bool backward) {
  using namespace vis::msda;
  const auto problem = make_problem<S>(
      call.images, call.rows, call.heads, call.channels, call.queries, call.levels, call.points, call.shapes, call.starts);
  const Inputs<T, S> inputs{
      static_cast<const T*>(call.value), static_cast<const Place<S>*>(call.locations), call.weights, call.wide != 0};
  if (backward) {
    const Gradients<T, S> gradients{
        static_cast<const T*>(call.grad), static_cast<S*>(call.grad_value), static_cast<Place<S>*>(call.grad_locations),
        call.grad_weights};
    vis::msda::backward(problem, inputs, gradients, Launcher{});
  } else {
    vis::msda::forward(problem, inputs, static_cast<T*>(call.output), Launcher{});
  }
  return vector_lanes(problem);
}

} // namespace

template <>
struct vis::msda::IsBfloat16<Bfloat16> : std::true_type {};

// Returns the lanes of the chosen kernel for fixed channels, 0 for the generic one, -1 for an unknown type.
extern "C" int emulate(const Call* call, int type, int backward) {
  switch (type) {
    case 0:
      return run<float, float>(*call, backward != 0);
    case 1:
      return run<double, double>(*call, backward != 0);
    case 2:
      return run<Half, float>(*call, backward != 0);
    case 3:
      return run<Bfloat16, float>(*call, backward != 0);
    default:
      return -1;
  }
}
