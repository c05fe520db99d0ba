// The operators: schema, checks, allocation, and the spread over threads or the launch.
//
// Only the stable ABI of LibTorch is used, so that one binary serves torch 2.11 and later and every Python.
// `Masks` in fastalign/method/masks.py and `pack_masks` in fastalign/ops pass what is checked here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "masks.h"

namespace fastalign {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using DrawnPacked = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t IMAGES_A_THREAD = 8;  // fewer are not worth waking a thread

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

struct PackedTensors {
  Tensor indices, slots, starts, counts;
  Pack pack;
};

PackedTensors allocate(const Tensor& like, int64_t images, int64_t copies, int64_t patches, int64_t prefix,
                       int64_t length) {
  constexpr int64_t LIMIT = std::numeric_limits<int32_t>::max();
  require(prefix >= 0 && prefix <= LIMIT && length >= 0 && length <= LIMIT,
          "pack_masks: prefix and length must lie in 0..2^31-1");
  const int64_t tokens = prefix + patches, sequences = images * copies;
  require(tokens <= LIMIT && sequences < LIMIT && tokens * sequences <= LIMIT,
          "pack_masks: more than 2^31 - 1 tokens, which 32-bit indices cannot name");
  PackedTensors result{empty({length}, ScalarType::Int, like), empty({images, copies, tokens}, ScalarType::Int, like),
                       empty({sequences + 1}, ScalarType::Int, like), empty({sequences}, ScalarType::Int, like), {}};
  auto pointer = [](const Tensor& tensor) { return tensor.mutable_data_ptr<int32_t>(); };
  result.pack = {int32_t(images), int32_t(copies), int32_t(patches), int32_t(prefix), length,
                 pointer(result.indices), pointer(result.slots), pointer(result.starts), pointer(result.counts)};
  return result;
}

void draw_cpu(const Draw& draw, const Tensor& ids, const Tensor& visible) {
  const auto* id = ids.const_data_ptr<int64_t>();
  auto* out = visible.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, ids.size(0), IMAGES_A_THREAD,
                              [&](int64_t begin, int64_t end) { cpu::draw(draw, id, out, begin, end); });
}

void pack_cpu(const Pack& pack, const Tensor& visible) {
  const auto* mask = visible.const_data_ptr<bool>();
  const int64_t sequences = pack.sequences();
  torch::stable::parallel_for(0, sequences, 4 * IMAGES_A_THREAD,
                              [&](int64_t begin, int64_t end) { cpu::count(pack, mask, begin, end); });
  pack.starts[0] = 0;
  for (int64_t s = 0; s < sequences; ++s) pack.starts[s + 1] = pack.starts[s] + pack.counts[s];
  const int64_t total = pack.starts[sequences];
  require(total <= pack.length, "pack_masks: length is " + std::to_string(pack.length) + ", but " +
                                    std::to_string(total) + " tokens are visible");
  torch::stable::parallel_for(0, sequences, 4 * IMAGES_A_THREAD,
                              [&](int64_t begin, int64_t end) { cpu::pack(pack, mask, begin, end); });
  std::fill(pack.indices + total, pack.indices + pack.length, -1);
}

#ifdef FASTALIGN_CUDA
// Queues on the current stream of the tensor's device: call(stream) returns nullptr or an error's text.
template <class Call>
void on_stream(const Tensor& tensor, const Call& call) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  const char* error = call(stream);
  require(error == nullptr, std::string("fastalign: a mask kernel was not launched: ") + (error ? error : ""));
}
#endif

void run_draw(const Draw& draw, const Tensor& ids, const Tensor& visible) {
  if (ids.size(0) == 0) return;
#ifdef FASTALIGN_CUDA
  if (ids.is_cuda()) {
    const auto* id = ids.const_data_ptr<int64_t>();
    auto* out = visible.mutable_data_ptr<bool>();
    return on_stream(ids, [&](void* stream) { return cuda::draw(draw, ids.size(0), id, out, stream); });
  }
#endif
  draw_cpu(draw, ids, visible);
}

// With no sequence there is nothing to launch, but the outputs have a meaning.
bool packed_nothing(PackedTensors& packed) {
  if (packed.pack.sequences() > 0) return false;
  torch::stable::fill_(packed.indices, -1);
  torch::stable::zero_(packed.starts);
  return true;
}

Tensor draw_masks(Tensor sample_ids, int64_t rows, int64_t columns, int64_t kind, double ratio, int64_t seed,
                  int64_t epoch, bool complement, bool full) {
  const Draw draw = make_draw(rows, columns, kind, ratio, seed, epoch, complement, full);
  require(sample_ids.dim() == 1, "draw_masks: sample_ids must be [B]");
  const Tensor ids = torch::stable::contiguous(sample_ids);
  Tensor visible = empty({ids.size(0), draw.copies, rows * columns}, ScalarType::Bool, ids);
  run_draw(draw, ids, visible);
  return visible;
}

Packed pack_masks(Tensor visible, int64_t prefix, int64_t length) {
  require(visible.dim() == 3, "pack_masks: visible must be [B, M, N]");
  const Tensor masks = torch::stable::contiguous(visible);
  PackedTensors packed = allocate(masks, masks.size(0), masks.size(1), masks.size(2), prefix, length);
  if (!packed_nothing(packed)) {
#ifdef FASTALIGN_CUDA
    if (masks.is_cuda()) {
      const auto* mask = masks.const_data_ptr<bool>();
      on_stream(masks, [&](void* stream) { return cuda::pack(packed.pack, mask, stream); });
    } else
#endif
      pack_cpu(packed.pack, masks);
  }
  return {packed.indices, packed.slots, packed.starts, packed.counts};
}

DrawnPacked draw_packed_masks(Tensor sample_ids, int64_t rows, int64_t columns, int64_t kind, double ratio,
                              int64_t seed, int64_t epoch, bool complement, bool full, int64_t prefix,
                              int64_t length) {
  const Draw draw = make_draw(rows, columns, kind, ratio, seed, epoch, complement, full);
  require(sample_ids.dim() == 1, "draw_packed_masks: sample_ids must be [B]");
  const Tensor ids = torch::stable::contiguous(sample_ids);
  Tensor visible = empty({ids.size(0), draw.copies, rows * columns}, ScalarType::Bool, ids);
  PackedTensors packed = allocate(ids, ids.size(0), draw.copies, rows * columns, prefix, length);
  if (!packed_nothing(packed)) {
#ifdef FASTALIGN_CUDA
    if (ids.is_cuda()) {
      const auto* id = ids.const_data_ptr<int64_t>();
      auto* out = visible.mutable_data_ptr<bool>();
      on_stream(ids, [&](void* stream) { return cuda::draw_packed(draw, packed.pack, id, out, stream); });
    } else
#endif
    {
      draw_cpu(draw, ids, visible);
      pack_cpu(packed.pack, visible);
    }
  }
  return {visible, packed.indices, packed.slots, packed.starts, packed.counts};
}

}  // namespace
}  // namespace fastalign

// A fragment, because the Triton kernels register operators of the same namespace from Python. SymInt, so that
// torch.compile does not specialize on the epoch or the length.
STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def(
      "draw_masks(Tensor sample_ids, SymInt rows, SymInt columns, int kind, float ratio, int seed, SymInt epoch, "
      "bool complement, bool full) -> Tensor");
  m.def("pack_masks(Tensor visible, SymInt prefix, SymInt length) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "draw_packed_masks(Tensor sample_ids, SymInt rows, SymInt columns, int kind, float ratio, int seed, "
      "SymInt epoch, bool complement, bool full, SymInt prefix, SymInt length) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#define FASTALIGN_IMPLEMENT(device)                                       \
  STABLE_TORCH_LIBRARY_IMPL(fastalign, device, m) {                       \
    m.impl("draw_masks", TORCH_BOX(&fastalign::draw_masks));              \
    m.impl("pack_masks", TORCH_BOX(&fastalign::pack_masks));              \
    m.impl("draw_packed_masks", TORCH_BOX(&fastalign::draw_packed_masks)); \
  }

FASTALIGN_IMPLEMENT(CPU)
#ifdef FASTALIGN_CUDA
FASTALIGN_IMPLEMENT(CUDA)
#endif
