// Op `step`: the CPU kernels under the schemas of ppkernels/ops/step/op.py.
//
// All tensors of a call are one list of elements that is cut into a part for each thread, so that
// many small tensors and a few large ones keep the threads equally busy.
#include "kernels/step.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings/masks.h"
#include "bindings/tensors.h"

namespace ppkernels::bindings {
namespace {

using Tensors = std::vector<Tensor>;

// ---- arguments

void check_length(const char* op, const char* name, size_t length, size_t weights) {
  require(length == weights, op, ": ", name, " must have an entry for each of the ", weights,
          " weights, got ", length);
}

// As `check_length`, where an empty list stands for none at all.
void check_optional(const char* op, const char* name, size_t length, size_t weights) {
  if (length != 0) check_length(op, name, length, weights);
}

bool is_half(Type type) { return type == Type::kBFloat16 || type == Type::kFloat16; }

// A state is of the weight's dtype, or float32 beside a half type.
void check_state(const char* op, const char* name, const Tensor& state, const Tensor& weight,
                 Type weight_type) {
  const bool is_wide = is_half(weight_type) && state.scalar_type() == ScalarType::Float;
  const bool fits = is_wide || state.scalar_type() == weight.scalar_type();
  if (fits && state.is_cpu() && same_sizes(state, weight)) return;
  require(false, op, ": ", name, " must be a CPU tensor like its weight, ", described(weight),
          ", or float32 where that is a half type; got ", described(state));
}

void check_word(const char* op, const char* name, const std::string& word, const char* first,
                const char* second) {
  require(word == first || word == second, op, ": ", name, " must be '", first, "' or '", second,
          "', got '", word, "'");
}

double number_in(const char* op, const char* name, const std::optional<Tensor>& t, double none) {
  if (!t.has_value()) return none;
  if (!t->is_cpu() || t->scalar_type() != ScalarType::Float || t->numel() != 1) {
    require(false, op, ": ", name, " must hold one float32 number on the CPU, as the weights are, ",
            "got ", described(*t));
  }
  return *t->const_data_ptr<float>();
}

// The learning rate, a tensor so that another value is no other graph to a tracer.
double rate_in(const char* op, const Tensor& lr) {
  const bool is_single = lr.scalar_type() == ScalarType::Float;
  const bool fits = is_single || lr.scalar_type() == ScalarType::Double;
  if (!lr.is_cpu() || !fits || lr.numel() != 1) {
    require(false, op, ": lr must hold one float32 or float64 number on the CPU, as the weights ",
            "are, got ", described(lr));
  }
  const double value = is_single ? *lr.const_data_ptr<float>() : *lr.const_data_ptr<double>();
  require(value >= 0 && std::isfinite(value), op, ": lr must be a finite number >= 0, got ", value);
  return value;
}

struct Arguments {
  const char* op;
  const Tensors &weights, &grads;
  // One list per state of the optimizer, each as long as `weights`.
  std::vector<const Tensors*> states;
  std::vector<const char*> state_names;
  const Tensors &masters, &masks, &alphas;
  const std::vector<int64_t>& holds_phi;

  void check() const {
    const size_t count = weights.size();
    check_length(op, "grads", grads.size(), count);
    check_length(op, "alphas", alphas.size(), count);
    for (size_t k = 0; k < states.size(); ++k) {
      check_length(op, state_names[k], states[k]->size(), count);
    }
    check_optional(op, "masters", masters.size(), count);
    check_optional(op, "masks", masks.size(), count);
    check_optional(op, "holds_phi", holds_phi.size(), count);
  }
};

// ---- one tensor of the list, as kernels see it

// A tensor that is not laid out as its weight: the kernel works on a copy, which goes home after.
struct Copied {
  Tensor home, copy;
};

struct Entry {
  StepTensor tensor{};
  int64_t elements = 0;
  // What has to live until the step is taken; empty where tensors are as they should be.
  std::vector<Copied> written;
  std::vector<Tensor> read;
};

// Address of `t`'s elements in the order of `layout`, which is dense.
void* memory_in(const Tensor& layout, const Tensor& t, Entry& entry) {
  if (same_strides(t, layout)) return t.mutable_data_ptr();
  entry.written.push_back({t, arranged_like(t, layout)});
  return entry.written.back().copy.mutable_data_ptr();
}

void set_states(const Arguments& a, size_t i, const Tensor& layout, Entry& e) {
  const Tensor& weight = a.weights[i];
  for (size_t k = 0; k < a.states.size(); ++k) {
    const Tensor& state = (*a.states[k])[i];
    check_state(a.op, a.state_names[k], state, weight, e.tensor.type);
    const Type type = type_of(a.op, state);
    if (k > 0 && type != e.tensor.state_type) {
      require(false, a.op, ": the states of a weight must have one dtype, got ",
              described((*a.states[0])[i]), " and ", described(state));
    }
    e.tensor.state_type = type;
    e.tensor.states[k] = memory_in(layout, state, e);
  }
  if (a.masters.empty() || a.masters[i].numel() == 0) return;
  const Tensor& master = a.masters[i];
  check_state(a.op, "masters", master, weight, e.tensor.type);
  const bool fits = is_half(e.tensor.type) && master.scalar_type() == ScalarType::Float &&
                    (a.states.empty() || e.tensor.state_type == Type::kFloat32);
  require(fits, a.op, ": a master copy is float32 beside a half weight, with float32 states");
  e.tensor.state_type = Type::kFloat32;
  e.tensor.master = memory_in(layout, master, e);
}

Entry entry_of(const Arguments& a, size_t i) {
  const Tensor &weight = a.weights[i], &grad = a.grads[i];
  Entry e;
  e.elements = weight.numel();
  e.tensor.type = e.tensor.state_type = type_of(a.op, weight);
  check_like(a.op, "grads", grad, weight);
  const Tensor dense = is_dense(weight) ? weight : torch::stable::contiguous(weight);
  e.tensor.weight = memory_in(dense, weight, e);
  if (same_strides(grad, dense)) {
    e.tensor.grad = grad.const_data_ptr();
  } else {
    e.read.push_back(arranged_like(grad, dense));
    e.tensor.grad = e.read.back().const_data_ptr();
  }
  set_states(a, i, dense, e);
  if (!a.masks.empty() && a.masks[i].numel() != 0) {
    check_words(a.op, a.masks[i], e.elements);
    e.read.push_back(arranged_mask(a.masks[i], dense));
    e.tensor.mask = (const uint8_t*)e.read.back().const_data_ptr();
  }
  e.tensor.alpha = exponent_of(a.op, "alphas", a.alphas[i]);
  e.tensor.holds_phi = !a.holds_phi.empty() && a.holds_phi[i] != 0;
  e.tensor.bias_correction1 = e.tensor.bias_correction2 = 1;
  return e;
}

std::vector<Entry> entries_of(const Arguments& a) {
  std::vector<Entry> entries;
  entries.reserve(a.weights.size());
  for (size_t i = 0; i < a.weights.size(); ++i) entries.push_back(entry_of(a, i));
  return entries;
}

// ---- the pass over all of them

template <class Options>
void run(std::vector<Entry>& entries, const Options& options,
         void (*kernel)(const Options&, const StepTensor&, int64_t, int64_t)) {
  // first[i]: how many runs of kStepAlignment elements stand before entry i.
  std::vector<int64_t> first(1, 0);
  for (const Entry& e : entries) {
    first.push_back(first.back() + (e.elements + kStepAlignment - 1) / kStepAlignment);
  }
  for_each_part(first.back() * kStepAlignment, [&](int64_t begin, int64_t end) {
    // The bounds that threads get are cut anywhere; each takes the runs that start within its own.
    int64_t run = (begin + kStepAlignment - 1) / kStepAlignment;
    const int64_t last = (end + kStepAlignment - 1) / kStepAlignment;
    size_t i = std::upper_bound(first.begin(), first.end(), run) - first.begin() - 1;
    for (; run < last && i < entries.size(); ++i) {
      const int64_t until = std::min(first[i + 1], last);
      if (until <= run) continue;
      const Entry& e = entries[i];
      const int64_t from = (run - first[i]) * kStepAlignment;
      kernel(options, e.tensor, from, std::min(e.elements, (until - first[i]) * kStepAlignment));
      run = until;
    }
  });
  for (Entry& e : entries) {
    for (Copied& block : e.written) torch::stable::copy_(block.home, block.copy);
  }
}

// ---- options

struct CommonArguments {
  double lr, weight_decay;
  const std::string &decay, &decay_of, &rule;
  bool maximize;
  const std::optional<Tensor>& grad_scale;
};

void set_options(const char* op, StepOptions& o, const CommonArguments& a) {
  check_word(op, "rule", a.rule, "virtual", "chain");
  check_word(op, "decay", a.decay, "coupled", "decoupled");
  check_word(op, "decay_of", a.decay_of, "theta", "phi");
  o.lr = a.lr;
  o.weight_decay = a.weight_decay;
  o.decoupled = a.decay == "decoupled";
  o.decay_of_phi = a.decay_of == "phi";
  o.chain = a.rule == "chain";
  o.grad_factor = (a.maximize ? -1 : 1) / number_in(op, "grad_scale", a.grad_scale, 1);
  require(!o.decoupled || a.lr * a.weight_decay < 1, op,
          ": decoupled decay multiplies weights by 1 - lr * weight_decay, which must be positive; ",
          "got lr ", a.lr, " and weight_decay ", a.weight_decay);
}

bool found_inf_in(const char* op, const std::optional<Tensor>& found_inf) {
  return number_in(op, "found_inf", found_inf, 0) != 0;
}

void sgd_step(Tensors weights, Tensors grads, Tensors momentum_buffers, Tensors masters,
              Tensors masks, Tensors alphas, std::vector<int64_t> holds_phi, Tensor lr,
              double momentum, double dampening, bool nesterov, double weight_decay,
              std::string decay, std::string decay_of, std::string rule, bool maximize,
              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const char* op = "sgd_step_";
  Arguments a{op, weights, grads, {}, {}, masters, masks, alphas, holds_phi};
  if (!momentum_buffers.empty()) {
    a.states = {&momentum_buffers};
    a.state_names = {"momentum_buffers"};
  }
  a.check();
  SgdOptions options{};
  const double rate = rate_in(op, lr);
  set_options(op, options, {rate, weight_decay, decay, decay_of, rule, maximize, grad_scale});
  options.momentum = momentum;
  options.dampening = dampening;
  options.nesterov = nesterov;
  if (found_inf_in(op, found_inf)) return;
  std::vector<Entry> entries = entries_of(a);
  run(entries, options, step_kernels(isa()).sgd);
}

// Counts the step, and gives both bias corrections; most tensors of a list have the same count.
class StepCounts {
 public:
  StepCounts(double beta1, double beta2) : beta1_(beta1), beta2_(beta2) {}

  static void check(const char* op, const Tensor& step) {
    if (step.is_cpu() && step.scalar_type() == ScalarType::Float && step.numel() == 1) return;
    require(false, op, ": steps must be float32 tensors of one number on the CPU, got ",
            described(step));
  }

  void advance(const Tensor& step, StepTensor& tensor) {
    const float count = ++*step.mutable_data_ptr<float>();
    if (count != count_) {
      count_ = count;
      correction1_ = 1 - std::pow(beta1_, double(count));
      correction2_ = 1 - std::pow(beta2_, double(count));
    }
    tensor.bias_correction1 = correction1_;
    tensor.bias_correction2 = correction2_;
  }

 private:
  double beta1_, beta2_;
  float count_ = 0;
  double correction1_ = 1, correction2_ = 1;
};

void adam_step(Tensors weights, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
               Tensors max_exp_avg_sqs, Tensors steps, Tensors masters, Tensors masks,
               Tensors alphas, std::vector<int64_t> holds_phi, Tensor lr, double beta1,
               double beta2, double eps, double weight_decay, std::string decay,
               std::string decay_of, std::string rule, bool maximize,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const char* op = "adam_step_";
  Arguments a{
      op,    weights, grads,    {&exp_avgs, &exp_avg_sqs}, {"exp_avgs", "exp_avg_sqs"}, masters,
      masks, alphas,  holds_phi};
  if (!max_exp_avg_sqs.empty()) {
    a.states.push_back(&max_exp_avg_sqs);
    a.state_names.push_back("max_exp_avg_sqs");
  }
  a.check();
  check_length(op, "steps", steps.size(), weights.size());
  AdamOptions options{};
  const double rate = rate_in(op, lr);
  set_options(op, options, {rate, weight_decay, decay, decay_of, rule, maximize, grad_scale});
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  if (found_inf_in(op, found_inf)) return;
  std::vector<Entry> entries = entries_of(a);
  // All of them before the first is counted up: a call that fails changes nothing.
  for (const Tensor& step : steps) StepCounts::check(op, step);
  StepCounts counts(beta1, beta2);
  for (size_t i = 0; i < weights.size(); ++i) counts.advance(steps[i], entries[i].tensor);
  run(entries, options, step_kernels(isa()).adam);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step));
  m.impl("adam_step_", TORCH_BOX(&adam_step));
}

}  // namespace ppkernels::bindings
