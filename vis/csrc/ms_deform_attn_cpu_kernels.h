// The CPU kernels for one instruction set: included once for each, with VIS_ISA (a namespace), VIS_TARGET (an
// attribute of functions) and VIS_BYTES (of a vector register) defined. No include guard, and no other header in it.
//
// Bound by loads of the value (4 neighbours x D a sample) from the second-level cache: a block stays with one head, whose
// rows fit there. Vectors are those of the compiler (GCC, Clang), so the same text serves every processor.

namespace vis {
namespace VIS_ISA {

template <typename T, int Bytes>
struct Vector {
  static constexpr int lanes = Bytes / sizeof(T);
  typedef T type __attribute__((vector_size(Bytes)));
  typedef T unaligned __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static_assert(Bytes >= 16, "smaller vectors are not worth it");
};

template <typename T>
VIS_TARGET inline T total(const typename Vector<T, 16>::type& v, T*) {
  T sum = v[0];
  for (int i = 1; i < Vector<T, 16>::lanes; ++i) {
    sum += v[i];
  }
  return sum;
}

#if VIS_BYTES >= 32
template <typename T>
VIS_TARGET inline T total(const typename Vector<T, 32>::type& v, T* tag) {
  typename Vector<T, 16>::type half[2];
  __builtin_memcpy(half, &v, 32);
  return total<T>(half[0] + half[1], tag);
}
#endif

#if VIS_BYTES >= 64
template <typename T>
VIS_TARGET inline T total(const typename Vector<T, 64>::type& v, T* tag) {
  typename Vector<T, 32>::type half[2];
  __builtin_memcpy(half, &v, 64);
  return total<T>(half[0] + half[1], tag);
}
#endif

// Along one axis: from places in 0..1 to the cell before each place (-2 outside, so that neither it nor the next is one)
// and to the shares of that cell and of the next. Selections instead of branches, so that it is vectorised. NaN is not
// "outside": it stays in the shares, but no index is made of it.
template <typename T>
VIS_TARGET inline void locate(
    int64_t count, const T* __restrict size, T* __restrict place, T* __restrict share, int32_t* __restrict cell) {
  for (int64_t i = 0; i < count; ++i) {
    const T n = size[i], at = place[i] * n - T(0.5);
    T known = at > T(-1) ? at : T(0);
    known = at < n ? known : T(0);
    int32_t lower = static_cast<int32_t>(known);
    lower -= known < static_cast<T>(lower) ? 1 : 0; // towards minus infinity
    T after = at - static_cast<T>(lower), before = T(1) - after;
    after = at <= T(-1) ? T(0) : after;
    after = at >= n ? T(0) : after;
    before = at <= T(-1) ? T(0) : before;
    before = at >= n ? T(0) : before;
    lower = at > T(-1) ? lower : -2;
    lower = at < n ? lower : -2;
    place[i] = after;
    share[i] = before;
    cell[i] = lower;
  }
}

// Shares times attention weights of the two neighbours in the upper or lower line, whose own share is `across`.
template <typename T>
VIS_TARGET inline void multiply(
    int64_t count, const T* __restrict attention, const T* __restrict before, const T* __restrict after,
    T* __restrict to_before, T* __restrict to_after, const T* __restrict across) {
  for (int64_t i = 0; i < count; ++i) {
    const T share = across[i] * attention[i];
    to_before[i] = share * before[i];
    to_after[i] = share * after[i];
  }
}

// Rows of the same two neighbours, -1 outside. The lower line is the `next` one after the upper.
VIS_TARGET inline void number(
    int64_t count, const int32_t* __restrict lines, const int32_t* __restrict columns, const int32_t* __restrict start,
    const int32_t* __restrict line, const int32_t* __restrict column, int32_t* __restrict left, int32_t* __restrict right,
    int32_t next) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t y = line[i] + next, x = column[i], row = start[i] + y * columns[i] + x;
    int32_t at_left = x < 0 ? -1 : row;
    at_left = y < 0 ? -1 : at_left;
    at_left = y >= lines[i] ? -1 : at_left;
    int32_t at_right = x < -1 ? -1 : row + 1;
    at_right = x + 1 >= columns[i] ? -1 : at_right;
    at_right = y < 0 ? -1 : at_right;
    at_right = y >= lines[i] ? -1 : at_right;
    left[i] = at_left;
    right[i] = at_right;
  }
}

// Copies what belongs to the samples of the block together, and sets them up.
template <typename T>
VIS_TARGET inline void set_up(const Arrays<T>& arrays, Scratch<T>& scratch, const Block<T>& block) {
  const Sizes& sizes = arrays.sizes;
  const int64_t samples = sizes.samples(), count = (block.last - block.first) * samples;
  T* __restrict xs = scratch.x();
  T* __restrict ys = scratch.y();
  T* __restrict attention = scratch.attention();
  for (int64_t q = block.first; q < block.last; ++q) {
    const int64_t at = ((block.image * sizes.queries + q) * sizes.heads + block.head) * samples;
    const int64_t to = (q - block.first) * samples;
    const T* __restrict from = arrays.locations + 2 * at;
    for (int64_t i = 0; i < samples; ++i) {
      xs[to + i] = from[2 * i];
      ys[to + i] = from[2 * i + 1];
      attention[to + i] = arrays.weights[at + i];
    }
  }
  locate(count, scratch.width(), xs, scratch.left(), scratch.column());
  locate(count, scratch.height(), ys, scratch.upper(), scratch.line());
  for (int below = 0; below < 2; ++below) {
    number(
        count, scratch.rows(), scratch.columns(), scratch.start(), scratch.line(), scratch.column(),
        scratch.row(2 * below), scratch.row(2 * below + 1), below);
    multiply(
        count, attention, scratch.left(), xs, scratch.share(2 * below), scratch.share(2 * below + 1),
        below ? ys : scratch.upper());
  }
}

// Sums of one query over `Count` vectors of channels. `zeros` stands for a neighbour outside.
template <typename T, int Bytes, int Count>
VIS_TARGET inline void gather(
    Scratch<T>& scratch, int64_t begin, int64_t end, const T* value, int64_t stride, const T* zeros, T* out) {
  using V = Vector<T, Bytes>;
  typename V::type sum[Count] = {};
  for (int64_t i = begin; i < end; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t row = scratch.row(corner)[i];
      const T* from = row < 0 ? zeros : value + row * stride;
      const T share = scratch.share(corner)[i];
      for (int k = 0; k < Count; ++k) {
        sum[k] += share * *reinterpret_cast<const typename V::unaligned*>(from + k * V::lanes);
      }
    }
  }
  for (int k = 0; k < Count; ++k) {
    *reinterpret_cast<typename V::unaligned*>(out + k * V::lanes) = sum[k];
  }
}

// For the same channels: adds to the gradient of the value and to the products with the gradient of the output.
template <typename T, int Bytes, int Count>
VIS_TARGET inline void scatter(
    Scratch<T>& scratch, int64_t begin, int64_t end, const T* value, int64_t stride, const T* grad_out, T* grad_value) {
  using V = Vector<T, Bytes>;
  typename V::type grad[Count];
  for (int k = 0; k < Count; ++k) {
    grad[k] = *reinterpret_cast<const typename V::unaligned*>(grad_out + k * V::lanes);
  }
  for (int64_t i = begin; i < end; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t row = scratch.row(corner)[i];
      if (row < 0) {
        continue;
      }
      const T* from = value + row * stride;
      T* to = grad_value + row * stride;
      const T share = scratch.share(corner)[i];
      typename V::type product = {};
      for (int k = 0; k < Count; ++k) {
        product += grad[k] * *reinterpret_cast<const typename V::unaligned*>(from + k * V::lanes);
        *reinterpret_cast<typename V::unaligned*>(to + k * V::lanes) += share * grad[k];
      }
      scratch.product(corner)[i] += total<T>(product, static_cast<T*>(nullptr));
    }
  }
}

template <typename T>
VIS_TARGET void forward(const Arrays<T>& arrays, Scratch<T>& scratch, const Block<T>& block) {
  constexpr int lanes = Vector<T, VIS_BYTES>::lanes, many = 128 / VIS_BYTES;
  alignas(64) static const T zeros[many * lanes] = {};
  const Sizes& sizes = arrays.sizes;
  const int64_t channels = sizes.channels, stride = sizes.heads * channels;
  set_up(arrays, scratch, block);
  const T* value = arrays.value + (block.image * sizes.rows * sizes.heads + block.head) * channels;
  for (int64_t q = block.first; q < block.last; ++q) {
    T* out = arrays.out + ((block.image * sizes.queries + q) * sizes.heads + block.head) * channels;
    const int64_t begin = (q - block.first) * sizes.samples(), end = begin + sizes.samples();
    int64_t c = 0;
    for (; c + many * lanes <= channels; c += many * lanes) {
      gather<T, VIS_BYTES, many>(scratch, begin, end, value + c, stride, zeros, out + c);
    }
    for (; c + lanes <= channels; c += lanes) {
      gather<T, VIS_BYTES, 1>(scratch, begin, end, value + c, stride, zeros, out + c);
    }
    for (; VIS_BYTES > 16 && c + Vector<T, 16>::lanes <= channels; c += Vector<T, 16>::lanes) {
      gather<T, 16, 1>(scratch, begin, end, value + c, stride, zeros, out + c);
    }
    for (; c < channels; ++c) {
      T sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t row = scratch.row(corner)[i];
          sum += scratch.share(corner)[i] * (row < 0 ? T(0) : value[row * stride + c]);
        }
      }
      out[c] = sum;
    }
  }
}

// From the products to the gradients of the locations and of the attention weights.
template <typename T>
VIS_TARGET inline void finish(const Arrays<T>& arrays, Scratch<T>& scratch, const Block<T>& block) {
  const Sizes& sizes = arrays.sizes;
  const int64_t samples = sizes.samples();
  for (int64_t q = block.first; q < block.last; ++q) {
    const int64_t to = ((block.image * sizes.queries + q) * sizes.heads + block.head) * samples;
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t at = (q - block.first) * samples + i;
      const T left = scratch.left()[at], right = scratch.x()[at], upper = scratch.upper()[at], lower = scratch.y()[at];
      const T product0 = scratch.product(0)[at], product1 = scratch.product(1)[at];
      const T product2 = scratch.product(2)[at], product3 = scratch.product(3)[at];
      const T along_x = upper * (product1 - product0) + lower * (product3 - product2);
      const T along_y = left * (product2 - product0) + right * (product3 - product1);
      arrays.grad_weights[to + i] = upper * (left * product0 + right * product1) + lower * (left * product2 + right * product3);
      arrays.grad_locations[2 * (to + i)] = scratch.attention()[at] * scratch.width()[at] * along_x;
      arrays.grad_locations[2 * (to + i) + 1] = scratch.attention()[at] * scratch.height()[at] * along_y;
    }
  }
}

template <typename T>
VIS_TARGET void backward(const Arrays<T>& arrays, Scratch<T>& scratch, const Block<T>& block) {
  constexpr int lanes = Vector<T, VIS_BYTES>::lanes, many = 128 / VIS_BYTES;
  const Sizes& sizes = arrays.sizes;
  const int64_t channels = sizes.channels, stride = sizes.heads * channels;
  set_up(arrays, scratch, block);
  for (int corner = 0; corner < 4; ++corner) {
    std::fill_n(scratch.product(corner), (block.last - block.first) * sizes.samples(), T(0));
  }
  const int64_t base = (block.image * sizes.rows * sizes.heads + block.head) * channels;
  const T* value = arrays.value + base;
  T* grad_value = block.grad_value + base;
  for (int64_t q = block.first; q < block.last; ++q) {
    const T* grad_out = arrays.grad_out + ((block.image * sizes.queries + q) * sizes.heads + block.head) * channels;
    const int64_t begin = (q - block.first) * sizes.samples(), end = begin + sizes.samples();
    int64_t c = 0;
    for (; c + many * lanes <= channels; c += many * lanes) {
      scatter<T, VIS_BYTES, many>(scratch, begin, end, value + c, stride, grad_out + c, grad_value + c);
    }
    for (; c + lanes <= channels; c += lanes) {
      scatter<T, VIS_BYTES, 1>(scratch, begin, end, value + c, stride, grad_out + c, grad_value + c);
    }
    for (; VIS_BYTES > 16 && c + Vector<T, 16>::lanes <= channels; c += Vector<T, 16>::lanes) {
      scatter<T, 16, 1>(scratch, begin, end, value + c, stride, grad_out + c, grad_value + c);
    }
    for (; c < channels; ++c) {
      for (int64_t i = begin; i < end; ++i) {
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t row = scratch.row(corner)[i];
          if (row >= 0) {
            scratch.product(corner)[i] += grad_out[c] * value[row * stride + c];
            grad_value[row * stride + c] += scratch.share(corner)[i] * grad_out[c];
          }
        }
      }
    }
  }
  finish(arrays, scratch, block);
}

template <typename T>
Kernels<T> kernels() {
  return {&forward<T>, &backward<T>};
}

} // namespace VIS_ISA
} // namespace vis
