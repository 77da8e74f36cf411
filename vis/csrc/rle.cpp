// Run-length codes of masks (COCO's compressed form): areas, and intersections of tracks, without decoding a pixel.
//
// A code writes each run in groups of five bits, low bits first, one character 48 + bits per group; bit 32: the run goes
// on, bit 16 of its last group: the sign. From the fourth run on the number is the difference from the run two places
// before. Runs alternate between background and foreground, column by column, beginning with background.
// What calls these is vis/evaluation/rle_kernels.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kLongestRun = int64_t{1} << 35;

// Calls foreground(start, length) for every run of the object that is not empty; false where the code is not one of
// a mask of this size.
template <typename Function>
bool walk(const uint8_t* code, int64_t length, int64_t num_pixels, Function foreground) {
  int64_t runs[2] = {0, 0};  // the last run and the one before it, by parity
  int64_t position = 0, place = 0, at = 0;
  while (at < length) {
    auto bits = static_cast<uint8_t>(code[at++] - 48);
    int64_t number = bits - ((bits & 16) << 1);  // most are of one group
    if (bits > 31) {
      number = bits & 31;
      int shift = 5;
      do {
        if (bits > 63 || at == length || shift > 30) return false;  // foreign, cut off, or longer than any run
        bits = static_cast<uint8_t>(code[at++] - 48);
        number |= static_cast<int64_t>(bits & 31) << shift;
        shift += 5;
      } while (bits & 32);
      if (bits > 63) return false;
      if (bits & 16) number -= int64_t{1} << shift;
    }
    if (place > 2) number += runs[place & 1];
    if (number < 0 || number > kLongestRun) return false;
    runs[place & 1] = number;
    if ((place & 1) && number > 0) {
      if (position + number > num_pixels) return false;
      foreground(position, number);
    }
    position += number;
    if (position > num_pixels) return false;
    ++place;
  }
  return place > 0 && position == num_pixels;
}

struct Codes {
  Codes(const at::Tensor& codes, const at::Tensor& ends)
      : text(codes.const_data_ptr<uint8_t>()), ends(ends.const_data_ptr<int64_t>()), count(ends.numel()) {
    TORCH_CHECK(codes.is_contiguous() && ends.is_contiguous(), "run-length codes must be contiguous");
    int64_t before = 0;
    for (int64_t i = 0; i < count; ++i) {
      TORCH_CHECK(this->ends[i] >= before, "the ends of run-length codes must not fall");
      before = this->ends[i];
    }
    TORCH_CHECK(before == codes.numel(), "the last code must end where the text does");
  }
  const uint8_t* begin(int64_t i) const { return text + (i ? ends[i - 1] : 0); }
  int64_t length(int64_t i) const { return ends[i] - (i ? ends[i - 1] : 0); }

  const uint8_t* text;
  const int64_t* ends;
  int64_t count;
};

// (N,) int64 pixels of each code; -1 for one that is no mask of num_pixels pixels.
at::Tensor rle_areas(const at::Tensor& codes, const at::Tensor& ends, int64_t num_pixels) {
  const Codes given(codes, ends);
  at::Tensor areas = at::empty({given.count}, ends.options());
  int64_t* out = areas.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < given.count; ++i) {
    int64_t area = 0;
    const bool good =
        walk(given.begin(i), given.length(i), num_pixels, [&](int64_t, int64_t run) { area += run; });
    out[i] = good ? area : -1;
  }
  return areas;
}

struct Interval {
  uint32_t start, end;
};

// The masks of one frame, those that are there: foreground intervals of pixel numbers, and the box around them.
struct Mask {
  int64_t track;
  size_t first, last;          // in the intervals of the frame
  uint32_t x0, x1, y0, y1;     // columns and rows, both ends included
};

struct Frame {
  void read(const Codes& codes, int64_t frame, int64_t frames, int64_t height, int64_t num_pixels) {
    intervals.clear();
    masks.clear();
    const auto rows = static_cast<uint32_t>(height);
    for (int64_t track = 0; track * frames < codes.count; ++track) {
      const int64_t i = track * frames + frame;
      if (codes.length(i) == 0) continue;
      Mask mask{track, intervals.size(), 0, 0, 0, rows - 1, 0};
      const bool good = walk(codes.begin(i), codes.length(i), num_pixels, [&](int64_t start, int64_t run) {
        const auto from = static_cast<uint32_t>(start), to = static_cast<uint32_t>(start + run);
        const uint32_t column = from / rows, top = from - column * rows;
        if (top + (to - from) <= rows) {
          mask.y0 = std::min(mask.y0, top);
          mask.y1 = std::max(mask.y1, top + (to - from) - 1);
        } else {  // it goes on in the next column
          mask.y0 = 0;
          mask.y1 = rows - 1;
        }
        intervals.push_back({from, to});
      });
      TORCH_CHECK_VALUE(good, "a run-length code of track ", track, ", frame ", frame, ", does not fit its size");
      mask.last = intervals.size();
      if (mask.first == mask.last) continue;
      mask.x0 = intervals[mask.first].start / rows;
      mask.x1 = (intervals[mask.last - 1].end - 1) / rows;
      masks.push_back(mask);
    }
  }

  std::vector<Interval> intervals;
  std::vector<Mask> masks;
};

int64_t common(const Frame& a, const Mask& p, const Frame& b, const Mask& q) {
  int64_t total = 0;
  size_t i = p.first, j = q.first;
  while (i < p.last && j < q.last) {
    const Interval u = a.intervals[i], v = b.intervals[j];
    const int64_t overlap = int64_t{std::min(u.end, v.end)} - int64_t{std::max(u.start, v.start)};
    total += std::max(overlap, int64_t{0});
    const bool step = u.end < v.end;
    i += step;
    j += !step;
  }
  return total;
}

// (A, B, T) int64 pixels that track a and track b share in each frame. Codes are those of all frames of the first
// track, then of the second ...; an empty code is a frame without a mask.
at::Tensor rle_intersections(
    const at::Tensor& codes_a, const at::Tensor& ends_a, const at::Tensor& codes_b, const at::Tensor& ends_b,
    int64_t frames, int64_t height, int64_t num_pixels) {
  const Codes a(codes_a, ends_a), b(codes_b, ends_b);
  TORCH_CHECK(frames > 0 && a.count % frames == 0 && b.count % frames == 0, "codes and frames do not fit");
  TORCH_CHECK(height > 0 && num_pixels > 0 && num_pixels < (int64_t{1} << 31), "a picture of an impossible size");
  const int64_t columns = b.count / frames;
  at::Tensor shared = at::zeros({a.count / frames, columns, frames}, ends_a.options());
  int64_t* out = shared.mutable_data_ptr<int64_t>();
  Frame of_a, of_b;
  for (int64_t frame = 0; frame < frames; ++frame) {
    of_b.read(b, frame, frames, height, num_pixels);
    if (of_b.masks.empty()) continue;
    of_a.read(a, frame, frames, height, num_pixels);
    for (const Mask& p : of_a.masks) {
      for (const Mask& q : of_b.masks) {
        if (p.x1 < q.x0 || q.x1 < p.x0 || p.y1 < q.y0 || q.y1 < p.y0) continue;
        out[(p.track * columns + q.track) * frames + frame] = common(of_a, p, of_b, q);
      }
    }
  }
  return shared;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vis, m) {
  m.def("rle_areas(Tensor codes, Tensor ends, int num_pixels) -> Tensor");
  m.def(
      "rle_intersections(Tensor codes_a, Tensor ends_a, Tensor codes_b, Tensor ends_b, int frames, int height, "
      "int num_pixels) -> Tensor");
}

TORCH_LIBRARY_IMPL(vis, CPU, m) {
  m.impl("rle_areas", rle_areas);
  m.impl("rle_intersections", rle_intersections);
}
