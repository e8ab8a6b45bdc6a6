// Attention of one query per head over a cache whose heads several of them may share, pieces of the cache beside each other
// ("flash-decoding").
#pragma once
#include "arguments.h"
#include "products.h"

#include <cmath>

namespace {

// [batch or 1][heads or 1][1][length], in fp32.
struct Mask {
  std::optional<Tensor> tensor;  // that data lies in, or
  std::unique_ptr<float[]> widened;
  const float* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;
};

// What all queries make of every kPositions positions, and then of all.
class Attention : public Job {
 public:
  Attention(Tensor q, Tensor k, Tensor v, Mask mask, ValueType type, double scale, const InstructionSet& isa)
      : q_(std::move(q)), k_(std::move(k)), v_(std::move(v)), mask_(std::move(mask)), type_(type), value_(type == sparsec::kFloat32 ? 4 : 2),
        scale_(static_cast<float>(scale)), isa_(isa), batch_(q_.size(0)), heads_(q_.size(1)), width_(q_.size(3)),
        value_width_(v_.size(3)), length_(k_.size(2)),
        queries_(mask_.head_stride ? 1 : heads_ / k_.size(1)),  // with a mask for every head each is on its own
        groups_(heads_ / queries_), per_shared_(heads_ / k_.size(1) / queries_),
        blocks_(std::max<int64_t>(1, (length_ + sparsec::kPositions - 1) / sparsec::kPositions)),
        padded_((std::max(width_, value_width_) + 15) / 16 * 16) {
    const int64_t rows = batch_ * heads_;
    wide_.assign(static_cast<size_t>(rows * padded_), 0.0f);
    sums_.assign(static_cast<size_t>(rows * blocks_ * padded_), 0.0f);
    highest_.resize(static_cast<size_t>(rows * blocks_));
    weights_.resize(highest_.size());
    for (int64_t i = 0; i < rows; ++i)
      isa_.widen[type_](static_cast<const char*>(q_.const_data_ptr()) + value_ * i * width_, wide_.data() + i * padded_, width_);
  }

  int64_t pieces() const override { return batch_ * groups_ * blocks_; }
  int64_t work(int64_t) const override { return 1; }
  void here(int64_t i) override { run(i, found(i), scratch(queries_ * sparsec::kPositions)); }
  void apart(int64_t i) override { run(i, aside(), scratch(queries_ * sparsec::kPositions)); }
  void hand_over(int64_t i) override {
    const Found to = found(i), from = aside();
    std::copy_n(from.sums, queries_ * padded_, to.sums);
    std::copy_n(from.highest, queries_, to.highest);
    std::copy_n(from.weights, queries_, to.weights);
  }
  void own() override {}  // it does

  void merge(void* out) const {
    std::vector<float> row(static_cast<size_t>(padded_));
    for (int64_t i = 0; i < batch_ * heads_; ++i) {
      const int64_t first = i / queries_ * blocks_ * queries_ + i % queries_;
      float most = highest_[first], sum = 0.0f;
      for (int64_t p = 1; p < blocks_; ++p) most = highest_[first + p * queries_] > most ? highest_[first + p * queries_] : most;
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t p = 0; p < blocks_; ++p) {
        const int64_t at = first + p * queries_;
        if (weights_[at] == 0.0f) continue;
        const float share = std::exp(highest_[at] - most);
        sum += share * weights_[at];
        for (int64_t d = 0; d < value_width_; ++d) row[d] += share * sums_[at * padded_ + d];
      }
      for (int64_t d = 0; d < value_width_; ++d) row[d] = sum == 0.0f ? 0.0f : row[d] / sum;
      isa_.narrow[type_](row.data(), static_cast<char*>(out) + value_ * i * value_width_, value_width_);
    }
  }

 private:
  struct Found {
    float* sums;     // [queries][padded]
    float* highest;  // [queries]
    float* weights;  // [queries]
  };
  Found found(int64_t i) {
    const int64_t block = i % blocks_, group = i / blocks_, at = (group * blocks_ + block) * queries_;
    return Found{sums_.data() + at * padded_, highest_.data() + at, weights_.data() + at};
  }
  Found aside() const {
    float* const memory = scratch<Purpose::result>(queries_ * (padded_ + 2));
    return Found{memory, memory + queries_ * padded_, memory + queries_ * (padded_ + 1)};
  }

  void run(int64_t i, const Found& to, float* scores) const {
    const int64_t block = i % blocks_, group = i / blocks_ % groups_, b = i / blocks_ / groups_, head = group * queries_;
    const int64_t cache = group / per_shared_;
    isa_.attend[type_](sparsec::AttendTask{
        wide_.data() + (b * heads_ + head) * padded_,
        static_cast<const char*>(k_.const_data_ptr()) + value_ * (b * k_.stride(0) + cache * k_.stride(1)),
        static_cast<const char*>(v_.const_data_ptr()) + value_ * (b * v_.stride(0) + cache * v_.stride(1)),
        mask_.data ? mask_.data + b * mask_.batch_stride + head * mask_.head_stride : nullptr, k_.stride(2), v_.stride(2), queries_, width_,
        value_width_, padded_, block * sparsec::kPositions, std::min(length_, (block + 1) * sparsec::kPositions), scale_, scores, to.sums,
        to.highest, to.weights});
  }

  const Tensor q_, k_, v_;
  const Mask mask_;
  const ValueType type_;
  const int64_t value_;  // bytes
  const float scale_;
  const InstructionSet& isa_;
  const int64_t batch_, heads_, width_, value_width_, length_;
  const int64_t queries_;     // that share keys and values, together
  const int64_t groups_;      // of these
  const int64_t per_shared_;  // groups of one head of the cache
  const int64_t blocks_;      // of positions
  const int64_t padded_;
  std::vector<float> wide_, sums_, highest_, weights_;
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
  if (mask) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == batch) &&
                        (mask->size(1) == 1 || mask->size(1) == heads) && mask->size(2) == 1 && mask->size(3) == length,
                    op, ": the mask must be [batch or 1, heads or 1, 1, length=", length, "]");
    const sparsec::ValueType mask_type = value_type(op, mask->scalar_type());
    STD_TORCH_CHECK(mask_type != sparsec::kFloat64, op, ": the mask must be float32, bfloat16 or float16");
    const Tensor plain = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
    if (mask_type == sparsec::kFloat32) {
      seen.tensor = plain;
      seen.data = static_cast<const float*>(plain.const_data_ptr());
    } else {
      seen.widened.reset(new float[std::max<int64_t>(1, plain.numel())]);
      isa.widen[mask_type](plain.const_data_ptr(), seen.widened.get(), plain.numel());
      seen.data = seen.widened.get();
    }
    seen.head_stride = plain.size(1) == 1 ? 0 : length;
    seen.batch_stride = plain.size(0) == 1 ? 0 : plain.size(1) * length;
  }
  Tensor out = empty(dtype_of(q), {batch, heads, 1, value_width});
  if (out.numel() == 0) return out;

  const auto attention = std::make_shared<Attention>(std::move(q), std::move(k), std::move(v), std::move(seen), type, scale, isa);
  const int64_t bytes = batch * shared * length * (width + value_width) * (type == sparsec::kFloat32 ? 4 : 2);
  together(attention, std::max<int64_t>(1, std::min<int64_t>({torch::stable::get_num_threads(), attention->pieces(), bytes / kBytesPerThread})));
  attention->merge(out.mutable_data_ptr());
  return out;
}

}  // namespace
