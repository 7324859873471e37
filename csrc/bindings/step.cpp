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
void check_state(const char* op, const char* name, const Tensor& state, const Tensor& weight) {
  const bool is_wide = is_half(type_of(op, weight)) && state.scalar_type() == ScalarType::Float;
  bool equal = state.dim() == weight.dim() && state.is_cpu() &&
               (is_wide || state.scalar_type() == weight.scalar_type());
  for (int64_t d = 0; equal && d < state.dim(); ++d) equal = state.size(d) == weight.size(d);
  if (equal) return;
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
  require(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->numel() == 1, op, ": ", name,
          " must hold one float32 number on the CPU, as the weights are, got ", described(*t));
  return *t->const_data_ptr<float>();
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

// A tensor as a block of memory in the element order of `layout`; if that takes a copy,
// `write_back` brings the values home.
struct Block {
  Block(const Tensor& t, const Tensor& layout) : home(t), dense(arranged_like(t, layout)) {}
  void write_back() {
    if (dense.const_data_ptr() != home.const_data_ptr()) torch::stable::copy_(home, dense);
  }
  Tensor home, dense;
};

struct Entry {
  StepTensor tensor{};
  int64_t elements;
  // What has to live until the step is taken.
  std::vector<Block> written;
  Tensor grad, mask;
};

Tensor dense_layout(const Tensor& t) { return is_dense(t) ? t : torch::stable::contiguous(t); }

Entry entry_of(const Arguments& a, size_t i) {
  const Tensor& weight = a.weights[i];
  Entry e;
  e.elements = weight.numel();
  e.tensor.type = e.tensor.state_type = type_of(a.op, weight);
  check_like(a.op, "grads", a.grads[i], weight);
  const Tensor layout = dense_layout(weight);
  const auto memory_of = [&](const Tensor& t) {
    e.written.emplace_back(t, layout);
    return (void*)e.written.back().dense.mutable_data_ptr();
  };
  e.tensor.weight = memory_of(weight);
  e.grad = arranged_like(a.grads[i], layout);
  e.tensor.grad = e.grad.const_data_ptr();
  for (size_t k = 0; k < a.states.size(); ++k) {
    const Tensor& state = (*a.states[k])[i];
    check_state(a.op, a.state_names[k], state, weight);
    const Type type = type_of(a.op, state);
    require(k == 0 || type == e.tensor.state_type, a.op, ": the states of a weight must have one ",
            "dtype, got ", described((*a.states[0])[i]), " and ", described(state));
    e.tensor.state_type = type;
    e.tensor.states[k] = memory_of(state);
  }
  if (!a.masters.empty() && a.masters[i].numel() != 0) {
    const Tensor& master = a.masters[i];
    check_state(a.op, "masters", master, weight);
    const bool fits = is_half(e.tensor.type) && master.scalar_type() == ScalarType::Float &&
                      (a.states.empty() || e.tensor.state_type == Type::kFloat32);
    require(fits, a.op, ": a master copy is float32 beside a half weight, with float32 states");
    e.tensor.state_type = Type::kFloat32;
    e.tensor.master = memory_of(master);
  }
  if (!a.masks.empty() && a.masks[i].numel() != 0) {
    check_words(a.op, a.masks[i], e.elements);
    e.mask = arranged_mask(a.masks[i], layout);
    e.tensor.mask = (const uint8_t*)e.mask.const_data_ptr();
  }
  e.tensor.alpha = exponent_of(a.op, "alphas", a.alphas[i]);
  e.tensor.holds_phi = !a.holds_phi.empty() && a.holds_phi[i] != 0;
  e.tensor.bias_correction1 = e.tensor.bias_correction2 = 1;
  return e;
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
    for (Block& block : e.written) block.write_back();
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
              Tensors masks, Tensors alphas, std::vector<int64_t> holds_phi, double lr,
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
  set_options(op, options, {lr, weight_decay, decay, decay_of, rule, maximize, grad_scale});
  options.momentum = momentum;
  options.dampening = dampening;
  options.nesterov = nesterov;
  if (found_inf_in(op, found_inf)) return;
  std::vector<Entry> entries;
  for (size_t i = 0; i < weights.size(); ++i) entries.push_back(entry_of(a, i));
  run(entries, options, step_kernels(isa()).sgd);
}

// Counts the step, and gives both bias corrections; most tensors of a list have the same count.
class StepCounts {
 public:
  StepCounts(double beta1, double beta2) : beta1_(beta1), beta2_(beta2) {}

  void advance(const char* op, const Tensor& step, StepTensor& tensor) {
    require(step.is_cpu() && step.scalar_type() == ScalarType::Float && step.numel() == 1, op,
            ": steps must be float32 tensors of one number on the CPU, got ", described(step));
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
               Tensors alphas, std::vector<int64_t> holds_phi, double lr, double beta1,
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
  set_options(op, options, {lr, weight_decay, decay, decay_of, rule, maximize, grad_scale});
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  if (found_inf_in(op, found_inf)) return;
  std::vector<Entry> entries;
  for (size_t i = 0; i < weights.size(); ++i) entries.push_back(entry_of(a, i));
  StepCounts counts(beta1, beta2);
  for (size_t i = 0; i < weights.size(); ++i) counts.advance(op, steps[i], entries[i].tensor);
  run(entries, options, step_kernels(isa()).adam);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppkernels, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step));
  m.impl("adam_step_", TORCH_BOX(&adam_step));
}

}  // namespace ppkernels::bindings
