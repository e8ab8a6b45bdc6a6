// Attention of one query per head over a cache whose heads several of them may share, pieces of the cache beside each other
// ("flash-decoding").
#pragma once
#include "arguments.h"
#include "products.h"

#include <cmath>

namespace {

// [batch or 1][heads or 1][1][length], in fp32.
struct Mask {
  std::unique_ptr<float[]> widened;
  const float* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;
};

Tensor decode_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, double scale) {
  const char* op = "decode_attention";
  const sparsec::InstructionSet& isa = *chosen.load(std::memory_order_relaxed);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(2) == 1, op,
                  ": q must be [batch, heads, 1, width], k and v [batch, shared, length, width]");
  const int64_t batch = q.size(0), heads = q.size(1), width = q.size(3), shared = k.size(1), length = k.size(2), value_width = v.size(3);
  STD_TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && v.size(1) == shared && v.size(2) == length && k.size(3) == width &&
                      shared > 0 && heads % shared == 0,
                  op, ": k and v must have q's batch, the same length, and heads that divide q's ", heads, "; k has ", shared);
  const ScalarType scalar = q.scalar_type();
  const sparsec::ValueType type = value_type(op, scalar);
  STD_TORCH_CHECK(type != sparsec::kFloat64 && k.scalar_type() == scalar && v.scalar_type() == scalar && q.is_cpu() && k.is_cpu() &&
                      v.is_cpu(),
                  op, ": q, k and v must be of one dtype, float32, bfloat16 or float16, and on the CPU");
  if (!q.is_contiguous()) q = torch::stable::contiguous(q);
  if (k.stride(3) != 1) k = torch::stable::contiguous(k);
  if (v.stride(3) != 1) v = torch::stable::contiguous(v);
  Mask seen;
  Tensor plain_mask;
  if (mask) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == batch) &&
                        (mask->size(1) == 1 || mask->size(1) == heads) && mask->size(2) == 1 && mask->size(3) == length,
                    op, ": the mask must be [batch or 1, heads or 1, 1, length=", length, "]");
    const sparsec::ValueType mask_type = value_type(op, mask->scalar_type());
    STD_TORCH_CHECK(mask_type != sparsec::kFloat64, op, ": the mask must be float32, bfloat16 or float16");
    plain_mask = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
    if (mask_type == sparsec::kFloat32) {
      seen.data = static_cast<const float*>(plain_mask.const_data_ptr());
    } else {
      seen.widened.reset(new float[std::max<int64_t>(1, plain_mask.numel())]);
      isa.widen[mask_type](plain_mask.const_data_ptr(), seen.widened.get(), plain_mask.numel());
      seen.data = seen.widened.get();
    }
    seen.head_stride = plain_mask.size(1) == 1 ? 0 : length;
    seen.batch_stride = plain_mask.size(0) == 1 ? 0 : plain_mask.size(1) * length;
  }
  Tensor out = empty(dtype_of(q), {batch, heads, 1, value_width});
  if (out.numel() == 0) return out;

  // With a mask for every head each is on its own.
  const int64_t queries = seen.head_stride ? 1 : heads / shared, groups = heads / queries, per_shared = heads / shared / queries;
  const int64_t pieces = std::max<int64_t>(1, (length + sparsec::kPositions - 1) / sparsec::kPositions);
  const int64_t padded = (std::max(width, value_width) + 15) / 16 * 16;
  const int64_t value = type == sparsec::kFloat32 ? 4 : 2;
  const auto memory = [padded](int64_t rows) { return std::vector<float>(static_cast<size_t>(rows * padded), 0.0f); };
  std::vector<float> wide = memory(batch * heads), sums = memory(batch * heads * pieces);
  std::vector<float> highest(static_cast<size_t>(batch * heads * pieces)), weights(highest.size());
  for (int64_t i = 0; i < batch * heads; ++i)
    isa.widen[type](static_cast<const char*>(q.const_data_ptr()) + value * i * width, wide.data() + i * padded, width);

  const int64_t count = batch * groups * pieces, bytes = batch * shared * length * (width + value_width) * value;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), count, bytes / kBytesPerThread}));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* const scores = scratch(queries * sparsec::kPositions);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const int64_t piece = i % pieces, group = i / pieces % groups, b = i / pieces / groups, head = group * queries;
      const int64_t cache = group / per_shared, at = ((b * groups + group) * pieces + piece) * queries;
      isa.attend[type](sparsec::AttendTask{
          wide.data() + (b * heads + head) * padded,
          static_cast<const char*>(k.const_data_ptr()) + value * (b * k.stride(0) + cache * k.stride(1)),
          static_cast<const char*>(v.const_data_ptr()) + value * (b * v.stride(0) + cache * v.stride(1)),
          seen.data ? seen.data + b * seen.batch_stride + head * seen.head_stride : nullptr, k.stride(2), v.stride(2), queries, width,
          value_width, padded, piece * sparsec::kPositions, std::min(length, (piece + 1) * sparsec::kPositions),
          static_cast<float>(scale), scores, sums.data() + at * padded, highest.data() + at, weights.data() + at});
    }
  });

  std::vector<float> row(static_cast<size_t>(padded));
  for (int64_t i = 0; i < batch * heads; ++i) {
    const int64_t first = i / queries * pieces * queries + i % queries;
    float most = highest[first], sum = 0.0f;
    for (int64_t p = 1; p < pieces; ++p) most = highest[first + p * queries] > most ? highest[first + p * queries] : most;
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t at = first + p * queries;
      if (weights[at] == 0.0f) continue;
      const float share = std::exp(highest[at] - most);
      sum += share * weights[at];
      for (int64_t d = 0; d < value_width; ++d) row[d] += share * sums[at * padded + d];
    }
    for (int64_t d = 0; d < value_width; ++d) row[d] = sum == 0.0f ? 0.0f : row[d] / sum;
    isa.narrow[type](row.data(), static_cast<char*>(out.mutable_data_ptr()) + value * i * value_width, value_width);
  }
  return out;
}

}  // namespace
