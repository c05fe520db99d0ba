// Drawing and packing on the CPU, over a range of images or sequences; ops.cpp spreads the ranges over threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "masks.h"

namespace fastalign::cpu {
namespace {

constexpr int LANES = 16;

// The first `count` words of the row of `id`; `words` has room for the next multiple of 4 * LANES.
void fill(const Draw& draw, int64_t id, int32_t count, uint32_t* words) {
  for (int32_t first = 0; 4 * first < count; first += LANES) {
    uint32_t block[LANES];
    for (int i = 0; i < LANES; ++i) block[i] = first + i;
    const Words<LANES> random = draw_words<LANES>(draw, id, block);
    for (int i = 0; i < LANES; ++i)
      for (int j = 0; j < 4; ++j) words[4 * (first + i) + j] = random.w[j][i];
  }
}

void above(const uint32_t* words, uint32_t limit, int32_t count, uint8_t* visible) {
  for (int32_t n = 0; n < count; ++n) visible[n] = words[n] > limit;
}

void blockwise(const Draw& draw, int64_t id, uint8_t* visible) {
  const int32_t patches = draw.patches();
  std::memset(visible, 0, patches);
  int32_t covered = 0;
  Words<4> words;
  for (uint32_t i = 0; i < MAX_BLOCKS; ++i) {
    // Words i, 64 + i, 128 + i and 192 + i belong to rectangle i; four rectangles share four counters.
    if (i % 4 == 0) words = draw_words<4>(draw, id, {i / 4, 16 + i / 4, 32 + i / 4, 48 + i / 4});
    const uint32_t(&word)[4] = words.w[i % 4];
    const Rectangle box = rectangle(draw, word[0], word[1], word[2], word[3]);
    for (int32_t row = box.top; row < box.bottom; ++row) {
      uint8_t* line = visible + int64_t{row} * draw.columns;
      for (int32_t column = box.left; column < box.right; ++column) {
        covered += !line[column];
        line[column] = 1;
      }
    }
    if (covered >= draw.target) break;
  }
}

int32_t sum(const uint8_t* visible, int32_t count) {
  int32_t total = 0;
  for (int32_t n = 0; n < count; ++n) total += visible[n];
  return total;
}

}  // namespace

void draw(const Draw& draw, const int64_t* ids, bool* visible, int64_t begin, int64_t end) {
  const int32_t patches = draw.patches();
  const bool uniform = draw.kind == UNIFORM;
  std::vector<uint32_t> words(patches + 1 + 4 * LANES);
  for (int64_t b = begin; b < end; ++b) {
    auto* sample = reinterpret_cast<uint8_t*>(visible) + b * draw.copies * patches;
    if (draw.kind == BLOCKWISE) {
      blockwise(draw, ids[b], sample);
    } else if (uniform) {
      fill(draw, ids[b], patches + 1, words.data());
      above(words.data() + 1, words[0], patches, sample);
    } else if (draw.threshold == 0) {
      std::memset(sample, 0, patches);
    } else {  // hidden iff above threshold - 1, which fits a word
      fill(draw, ids[b], patches, words.data());
      above(words.data(), uint32_t(draw.threshold - 1), patches, sample);
      for (int32_t n = 0; n < patches; ++n) sample[n] ^= 1;
    }
    uint8_t* copy = sample + patches;
    if (draw.complement) {
      for (int32_t n = 0; n < patches; ++n) copy[n] = sample[n] ^ 1;
      copy += patches;
    }
    if (draw.full) std::memset(copy, 1, patches);
  }
}

void count(const Pack& pack, const bool* visible, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const auto* mask = reinterpret_cast<const uint8_t*>(visible) + s * pack.patches;
    pack.counts[s] = pack.prefix + sum(mask, pack.patches);
  }
}

void pack(const Pack& pack, const bool* visible, int64_t begin, int64_t end) {
  const int32_t tokens = pack.tokens();
  // Whether a patch is visible cannot be predicted, so nothing branches on it: every token is written, and the next
  // visible one overwrites a hidden one. In a buffer, because behind the last visible token lies the sequence of
  // another thread.
  std::vector<int32_t> kept(tokens + 1);
  for (int64_t s = begin; s < end; ++s) {
    const auto* mask = reinterpret_cast<const uint8_t*>(visible) + s * pack.patches;
    const int32_t start = pack.starts[s];
    const auto token = int32_t(s / pack.copies * tokens);
    int32_t* slots = pack.slots + s * tokens;
    int32_t found = 0;
    for (; found < pack.prefix; ++found) {
      kept[found] = token + found;
      slots[found] = start + found;
    }
    for (int32_t t = pack.prefix; t < tokens; ++t) {
      const int32_t keep = mask[t - pack.prefix];  // 0 or 1
      kept[found] = token + t;
      slots[t] = ((start + found + 1) & -keep) - 1;  // -1 where keep is 0
      found += keep;
    }
    std::copy_n(kept.data(), found, pack.indices + start);
  }
}

}  // namespace fastalign::cpu
