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

constexpr int64_t kCacheBytesPerThread = 1 << 15;  // more is done with a byte of a cache than of a matrix

// One query per head, and the cache that it reads: positions [first, last) of every head of k and v.
struct Query {
  const float* q;   // [batch][heads][width]
  Tensor k, v;      // [batch][shared][positions][width], of `type`; the last dimension is dense
  ValueType type;   // of k and v
  int64_t batch, heads, first, last;
  float scale, cap;  // cap: of scores, softly; 0: none
};

// What all queries make of every kPositions positions, and then of all.
class Attention : public Job {
 public:
  Attention(Query query, Mask mask, const InstructionSet& isa)
      : k_(std::move(query.k)), v_(std::move(query.v)), mask_(std::move(mask)), type_(query.type),
        value_(type_ == sparsec::kFloat32 ? 4 : 2), scale_(query.scale), cap_(query.cap), isa_(isa), batch_(query.batch),
        heads_(query.heads), width_(k_.size(3)), value_width_(v_.size(3)), first_(query.first), last_(query.last),
        queries_(mask_.head_stride ? 1 : heads_ / k_.size(1)),  // with a mask for every head each is on its own
        groups_(heads_ / queries_), per_shared_(heads_ / k_.size(1) / queries_),
        blocks_(std::max<int64_t>(1, (last_ - first_ + sparsec::kPositions - 1) / sparsec::kPositions)),
        padded_((std::max(width_, value_width_) + 15) / 16 * 16) {
    const int64_t rows = batch_ * heads_;
    wide_.assign(static_cast<size_t>(rows * padded_), 0.0f);
    sums_.assign(static_cast<size_t>(rows * blocks_ * padded_), 0.0f);
    highest_.resize(static_cast<size_t>(rows * blocks_));
    weights_.resize(highest_.size());
    for (int64_t i = 0; i < rows; ++i) std::copy_n(query.q + i * width_, width_, wide_.data() + i * padded_);
  }

  // By as many threads as it is worth.
  static std::shared_ptr<Attention> run(Query query, Mask mask, const InstructionSet& isa) {
    const auto found = std::make_shared<Attention>(std::move(query), std::move(mask), isa);
    const int64_t bytes = found->batch_ * found->k_.size(1) * (found->last_ - found->first_) * (found->width_ + found->value_width_) * found->value_;
    together(found, std::max<int64_t>(1, std::min<int64_t>({Team::available(), found->pieces(), bytes / kCacheBytesPerThread})));
    return found;
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

  // out [batch][heads][width of v], in fp32.
  void merge(float* out) const {
    for (int64_t i = 0; i < batch_ * heads_; ++i, out += value_width_) {
      const int64_t first = i / queries_ * blocks_ * queries_ + i % queries_;
      float most = highest_[first], sum = 0.0f;
      for (int64_t p = 1; p < blocks_; ++p) most = highest_[first + p * queries_] > most ? highest_[first + p * queries_] : most;
      std::fill_n(out, value_width_, 0.0f);
      for (int64_t p = 0; p < blocks_; ++p) {
        const int64_t at = first + p * queries_;
        if (weights_[at] == 0.0f) continue;
        const float share = std::exp(highest_[at] - most);
        sum += share * weights_[at];
        for (int64_t d = 0; d < value_width_; ++d) out[d] += share * sums_[at * padded_ + d];
      }
      for (int64_t d = 0; d < value_width_; ++d) out[d] = sum == 0.0f ? 0.0f : out[d] / sum;
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
        value_width_, padded_, first_ + block * sparsec::kPositions, std::min(last_, first_ + (block + 1) * sparsec::kPositions), scale_, cap_,
        scores, to.sums,
        to.highest, to.weights});
  }

  const Tensor k_, v_;
  const Mask mask_;
  const ValueType type_;
  const int64_t value_;  // bytes
  const float scale_, cap_;
  const InstructionSet& isa_;
  const int64_t batch_, heads_, width_, value_width_, first_, last_;
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

  const int64_t rows = batch * heads;
  std::vector<float> numbers(static_cast<size_t>(rows * std::max(width, value_width)));
  isa.widen[type](q.const_data_ptr(), numbers.data(), rows * width);
  const auto attention = Attention::run(Query{numbers.data(), std::move(k), std::move(v), type, batch, heads, 0, length, static_cast<float>(scale), 0.0f},
                                        std::move(seen), isa);
  attention->merge(numbers.data());
  isa.narrow[type](numbers.data(), out.mutable_data_ptr(), rows * value_width);
  return out;
}

}  // namespace
