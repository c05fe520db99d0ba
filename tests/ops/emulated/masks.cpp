// The launchers of csrc/masks_cuda.cu behind C functions, for ctypes.
#include "masks_cuda.cu"

using namespace fastalign;

extern "C" {

void set_order(bool descending) { emulation::descending = descending; }

void draw_masks(const int64_t* ids, int64_t images, int64_t rows, int64_t columns, int64_t kind, double ratio,
                int64_t seed, int64_t epoch, bool complement, bool full, bool* visible) {
  cuda::draw(make_draw(rows, columns, kind, ratio, seed, epoch, complement, full), images, ids, visible, nullptr);
}

void pack_masks(const bool* visible, int64_t images, int64_t copies, int64_t patches, int64_t prefix, int64_t length,
                int32_t* indices, int32_t* slots, int32_t* starts, int32_t* counts) {
  const Pack pack{int32_t(images), int32_t(copies), int32_t(patches), int32_t(prefix), length,
                  indices,         slots,           starts,           counts};
  cuda::pack(pack, visible, nullptr);
}

void draw_packed_masks(const int64_t* ids, int64_t images, int64_t rows, int64_t columns, int64_t kind, double ratio,
                       int64_t seed, int64_t epoch, bool complement, bool full, int64_t prefix, int64_t length,
                       bool* visible, int32_t* indices, int32_t* slots, int32_t* starts, int32_t* counts) {
  const Draw draw = make_draw(rows, columns, kind, ratio, seed, epoch, complement, full);
  const Pack pack{int32_t(images), draw.copies, draw.patches(), int32_t(prefix), length,
                  indices,         slots,       starts,         counts};
  cuda::draw_packed(draw, pack, ids, visible, nullptr);
}

}  // extern "C"
