// A token in one call: a program that stays, and the caches that it reads and writes.
#pragma once
#include <map>
#include <mutex>

#include "program.h"

namespace {

// A program of one step of a model: its inputs are a token and a position of each sequence, its last register the logits.
struct Stepper {
  Program program;
  Value logits;
  int64_t batch;
};

// Programs by number: the operators' arguments are tensors and numbers.
class Steppers {
 public:
  static Steppers& instance() {
    static Steppers* const found = new Steppers;  // never destroyed: other threads outlast main()
    return *found;
  }
  int64_t add(std::shared_ptr<Stepper> stepper) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_.emplace(++last_, std::move(stepper));
    return last_;
  }
  std::shared_ptr<Stepper> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = held_.find(number);
    STD_TORCH_CHECK(found != held_.end(), "step: there is no program ", number);
    return found->second;
  }
  void remove(int64_t number) {
    std::shared_ptr<Stepper> last;  // let go of outside of the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = held_.find(number);
    if (found == held_.end()) return;
    last = std::move(found->second);
    held_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Stepper>> held_;
  int64_t last_ = 0;
};

int64_t program(std::vector<Tensor> tensors, int64_t batch, std::vector<int64_t> code, std::vector<double> constants, int64_t result) {
  const char* op = "program";
  STD_TORCH_CHECK(batch > 0, op, ": batch must be above 0, got ", batch);
  const Value each = Value::rows(batch, 1, sparsec::kFloat32);
  Program made(op, std::move(tensors), constants, {each, each}, code);
  made.check_batch(batch);
  const Value logits = made.keep(result);
  STD_TORCH_CHECK(logits.contiguous() && logits.numel() % batch == 0, op, ": the result must have ", batch, " rows");
  made.plan();
  return Steppers::instance().add(std::make_shared<Stepper>(Stepper{std::move(made), logits, batch}));
}

// logits [batch, 1, words] of one more token of each sequence; nothing, [0], where a tensor has moved since the program was made.
Tensor step(int64_t number, Tensor ids, Tensor positions, std::optional<Tensor> mask, std::vector<Tensor> slabs, std::vector<int64_t> spans,
            std::optional<Tensor> times) {
  const char* op = "step";
  const std::shared_ptr<Stepper> stepper = Steppers::instance().find(number);
  const Value& logits = stepper->logits;
  const int64_t batch = stepper->batch;
  if (stepper->program.moved()) return empty(Run::kDtypes[logits.type](), {0});
  for (const Tensor* t : {&ids, &positions})
    STD_TORCH_CHECK(t->is_cpu() && t->numel() == batch && t->scalar_type() == ScalarType::Float, op, ": ids and positions must be float32 [", batch, "]");
  STD_TORCH_CHECK(slabs.size() == 2 * stepper->program.caches() && spans.size() == slabs.size(), op, ": the program has ",
                  stepper->program.caches(), " caches, got ", slabs.size() / 2);
  for (size_t i = 0; i < slabs.size(); ++i) stepper->program.check_slab(i, slabs[i], batch, spans[i / 2 * 2], spans[i / 2 * 2 + 1]);
  Call call{{ids, positions}};
  call.slabs = &slabs;
  call.spans = &spans;
  if (mask) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Float && mask->dim() == 2 &&
                        mask->size(0) == batch,
                    op, ": the mask must be contiguous float32 [", batch, ", positions]");
    call.mask = static_cast<const float*>(mask->const_data_ptr());
    call.positions = mask->size(1);
    for (size_t i = 0; i < spans.size(); i += 2)
      STD_TORCH_CHECK(spans[i + 1] - spans[i] < call.positions, op, ": the mask has ", call.positions, " positions, a cache more");
  }
  if (times) {
    STD_TORCH_CHECK(times->is_cpu() && times->is_contiguous() && times->scalar_type() == ScalarType::Long &&
                        times->numel() == static_cast<int64_t>(stepper->program.steps()),
                    op, ": times must be int64 [", stepper->program.steps(), "]");
    call.times = static_cast<int64_t*>(times->mutable_data_ptr());
  }
  const Run run = stepper->program.run(call);
  Tensor out = empty(Run::kDtypes[logits.type](), {batch, 1, logits.numel() / batch});
  run.give(logits, out.mutable_data_ptr(), logits.numel());
  return out;
}

}  // namespace
