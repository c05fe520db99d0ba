// What the CPU and the CUDA code share: the parameters of a draw, the arithmetic of a rectangle, the entry points.
//
// Shapes as in Python: B images, M masks an image, N patches, P prefix tokens, T = P + N, L rows of the packed row.
// `fastalign/method/masks.py` is the definition; everything here gives its bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "philox.h"

namespace fastalign {

enum Kind : int32_t { UNIFORM = 0, BERNOULLI = 1, BLOCKWISE = 2 };

constexpr int MIN_BLOCK_PATCHES = 16;
constexpr int MAX_BLOCKS = 64;

struct Draw {
  int32_t kind;
  int32_t rows, columns;
  int32_t copies;  // M = 1 + complement + full
  bool complement, full;
  uint32_t epoch, key0, key1;
  uint64_t threshold;               // Bernoulli: a patch is visible iff its word is below; up to 2^32
  int32_t smallest, span, target;   // blockwise: sizes smallest .. smallest + span - 1, patches to cover
  FASTALIGN_HD int32_t patches() const { return rows * columns; }
};

struct Pack {
  int32_t images, copies, patches, prefix;
  int64_t length;    // L
  int32_t* indices;  // [L]
  int32_t* slots;    // [B, M, T]
  int32_t* starts;   // [B * M + 1], cu_seqlens
  int32_t* counts;   // [B * M]
  FASTALIGN_HD int32_t tokens() const { return prefix + patches; }
  FASTALIGN_HD int32_t sequences() const { return images * copies; }
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// The parameters of a draw, in the arithmetic of fastalign/method/masks.py. seed: the bits of the unsigned one.
inline Draw make_draw(int64_t rows, int64_t columns, int64_t kind, double ratio, int64_t seed, int64_t epoch,
                      bool complement, bool full) {
  constexpr int64_t LIMIT = std::numeric_limits<int32_t>::max() / 4;  // M * N + 1 must fit too
  require(rows >= 0 && columns >= 0 && rows <= LIMIT && columns <= LIMIT && rows * columns <= LIMIT,
          "draw_masks: the grid must not be negative and have fewer than 2^29 patches");
  require(kind >= UNIFORM && kind <= BLOCKWISE, "draw_masks: kind must be 0, 1 or 2");
  require(ratio >= 0 && ratio <= 1, "draw_masks: ratio must lie in 0..1");
  Draw draw{};
  draw.kind = int32_t(kind);
  draw.rows = int32_t(rows);
  draw.columns = int32_t(columns);
  draw.copies = 1 + complement + full;
  draw.complement = complement;
  draw.full = full;
  draw.epoch = uint32_t(uint64_t(epoch));
  draw.key0 = uint32_t(uint64_t(seed));
  draw.key1 = uint32_t(uint64_t(seed) >> 32) ^ (MASKS_STREAM * 0x9E3779B1u);
  draw.threshold = uint64_t(std::nearbyint(ratio * 4294967296.0));  // half to even, as Python's round
  const double share = ratio * double(rows) * double(columns);
  const auto largest = int32_t(share);
  draw.smallest = std::max(1, std::min(MIN_BLOCK_PATCHES, largest - 1));
  draw.span = std::max(1, largest - draw.smallest);
  draw.target = int32_t(std::ceil(share - 1e-9));
  return draw;
}

struct Rectangle {
  int32_t top, left, bottom, right;  // bottom and right are outside
  FASTALIGN_HD bool covers(int32_t row, int32_t column) const {
    return row >= top && row < bottom && column >= left && column < right;
  }
};

// The four words of one counter: words 4 * block .. 4 * block + 3 of the row of `id`.
template <int LANES>
FASTALIGN_HD Words<LANES> draw_words(const Draw& draw, int64_t id, const uint32_t (&block)[LANES]) {
  Words<LANES> counter;
  for (int i = 0; i < LANES; ++i) {
    counter.w[0][i] = block[i];
    counter.w[1][i] = draw.epoch;
    counter.w[2][i] = uint32_t(uint64_t(id));
    counter.w[3][i] = uint32_t(uint64_t(id) >> 32);
  }
  return philox(counter, draw.key0, draw.key1);
}

FASTALIGN_HD double clamp(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

// Only +, -, *, /, sqrt and floor in float64, each correctly rounded by IEEE 754 on every device. The build forbids
// contraction into fused multiply-adds, which would round once where torch rounds twice.
FASTALIGN_HD Rectangle rectangle(const Draw& draw, uint32_t size_word, uint32_t aspect_word, uint32_t top_word,
                                 uint32_t left_word) {
  constexpr double UNIT = 1.0 / 4294967296.0;
  const double size = draw.smallest + floor(size_word * UNIT * draw.span);
  const double aspect = 0.3 + aspect_word * UNIT * (1 / 0.3 - 0.3);
  const double height = clamp(floor(sqrt(size / aspect)), 1, draw.rows);
  const double width = clamp(floor(size / height), 1, draw.columns);
  const auto top = int32_t(floor(top_word * UNIT * (draw.rows - height + 1)));
  const auto left = int32_t(floor(left_word * UNIT * (draw.columns - width + 1)));
  return {top, left, top + int32_t(height), left + int32_t(width)};
}

namespace cpu {
// Images begin .. end - 1. ids [B], visible [B, M, N].
void draw(const Draw& draw, const int64_t* ids, bool* visible, int64_t begin, int64_t end);
// Sequences begin .. end - 1: their lengths into pack.counts.
void count(const Pack& pack, const bool* visible, int64_t begin, int64_t end);
// Sequences begin .. end - 1, where pack.starts is known: their indices and slots.
void pack(const Pack& pack, const bool* visible, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
// Each queues its kernels on the stream (a cudaStream_t) and returns nullptr or the text of the launch's error.
const char* draw(const Draw& draw, int64_t images, const int64_t* ids, bool* visible, void* stream);
const char* pack(const Pack& pack, const bool* visible, void* stream);
const char* draw_packed(const Draw& draw, const Pack& pack, const int64_t* ids, bool* visible, void* stream);
}  // namespace cuda

}  // namespace fastalign
