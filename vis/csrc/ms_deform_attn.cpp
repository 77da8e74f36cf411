// The ops of the library vis._C. Kernels are registered beside their code; the fake kernel and the formula of the
// backward in Python (vis/layers/ms_deform_attn/library.py), where they hold without this library too.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

TORCH_LIBRARY(vis, m) {
  m.def(
      "ms_deform_attn(Tensor value, int[] spatial_shapes, int[] level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, int[] level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  // The library holds only beside the torch it was built with.
  m.def("built_with() -> str", []() { return std::string(TORCH_VERSION); });
}

// vis loads the library by its path and needs nothing of Python in it; `import vis._C` works where Python's headers are.
#if __has_include(<Python.h>)
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
#endif
