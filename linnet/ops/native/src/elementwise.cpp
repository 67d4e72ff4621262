// Norms and activations in one pass over memory, forward and backward: fp32 arithmetic on rows of
// fp32 or bf16, rounded once.

#include <cmath>
#include <vector>

#include "panels.h"
#include "threads.h"

namespace linnet {

struct NormArgs {
  Matrix x, gate, y;       // [R, D]; gate.data may be null: y = norm(x) weight sigmoid(gate)
  Matrix grad, grad_x, grad_gate;
  const float* weight;     // [D]
  float* inverse;          // [R] 1 / rms; written by the forward pass unless null
  float* grad_weight;      // [D]
  int64_t rows, dim;
  float eps;
  int32_t num_threads;
};

struct SwigluArgs {
  Matrix hidden, activated;       // [R, 2F], [R, F]
  Matrix grad_activated, grad_hidden;
  float* dots;                    // [R] activated . grad_activated
  int64_t rows, width;
  int32_t num_threads;
};

namespace {

// One row in fp32, padded to whole vectors with zeros.
class Row {
  float* data_;
  int64_t size_;

 public:
  Row(float* data, int64_t size) : data_(data), size_(size) {
    for (int64_t i = size; i < (size + W - 1) / W * W; i++) data[i] = 0.0f;
  }
  vf operator[](int64_t i) const { return load(data_ + i); }
  void set(int64_t i, vf value) { store(data_ + i, value); }
  void read(const Matrix& m, int64_t row) { read_row(m, row, size_, data_); }
  void read(const Matrix& m, int64_t row, int64_t first) {
    m.is_bf16 ? widen_row(m.row<bf16>(row) + first, size_, data_)
              : widen_row(m.row<float>(row) + first, size_, data_);
  }
  void write(const Matrix& m, int64_t row) const { write_row(m, row, size_, data_); }
  void write(const Matrix& m, int64_t row, int64_t first) const {
    m.is_bf16 ? narrow_row(data_, size_, m.row<bf16>(row) + first)
              : narrow_row(data_, size_, m.row<float>(row) + first);
  }
};

int64_t padded_size(int64_t n) { return (n + W - 1) / W * W; }

void norm_forward_row(const NormArgs& a, int64_t r, Row& x, Row& gate, const Row& weight) {
  x.read(a.x, r);
  vf squares = {};
  for (int64_t i = 0; i < a.dim; i += W) squares += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(sum(squares) / float(a.dim) + a.eps);
  if (a.inverse) a.inverse[r] = inverse;
  if (a.gate.data) {
    gate.read(a.gate, r);
    for (int64_t i = 0; i < a.dim; i += W) x.set(i, x[i] * inverse * weight[i] * sigmoid(gate[i]));
  } else {
    for (int64_t i = 0; i < a.dim; i += W) x.set(i, x[i] * inverse * weight[i]);
  }
  x.write(a.y, r);
}

// With n = x / rms, s = sigmoid(gate), g = grad:  dw = sum g s n,  dgate = g n w s (1 - s),
// dx = (g s w - n mean(g s w n)) / rms.
void norm_backward_row(const NormArgs& a, int64_t r, Row& x, Row& gate, Row& grad,
                       const Row& weight, Row& grad_weight) {
  const float inverse = a.inverse[r];
  x.read(a.x, r);
  grad.read(a.grad, r);
  if (a.gate.data) {
    gate.read(a.gate, r);
    for (int64_t i = 0; i < a.dim; i += W) {
      const vf s = sigmoid(gate[i]);
      gate.set(i, grad[i] * x[i] * inverse * weight[i] * s * (1.0f - s));
      grad.set(i, grad[i] * s);
    }
    gate.write(a.grad_gate, r);
  }
  vf dot = {};
  for (int64_t i = 0; i < a.dim; i += W) {
    const vf n = x[i] * inverse;
    grad_weight.set(i, grad_weight[i] + grad[i] * n);
    dot += grad[i] * weight[i] * n;
  }
  const float mean = sum(dot) / float(a.dim);
  for (int64_t i = 0; i < a.dim; i += W)
    x.set(i, (grad[i] * weight[i] - x[i] * inverse * mean) * inverse);
  x.write(a.grad_x, r);
}

template <typename Work>
void for_each_row(int64_t rows, int num_threads, int64_t scratch_floats, const Work& work) {
  // Below a few thousand numbers a second thread costs more than it does.
  const bool is_small = rows * scratch_floats < 16384;
#pragma omp parallel num_threads(is_small ? 1 : num_threads)
  {
    NoDenormals guard;
    const Scratch scratch(scratch_floats);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) work(r, scratch.get());
  }
}

}  // namespace

void norm_forward(const NormArgs& a) {
  const int64_t size = padded_size(a.dim);
  std::vector<float> weight(size);
  std::copy(a.weight, a.weight + a.dim, weight.begin());
  for_each_row(a.rows, a.num_threads, 2 * size, [&](int64_t r, float* p) {
    Row x(p, a.dim), gate(p + size, a.dim);
    norm_forward_row(a, r, x, gate, Row(weight.data(), a.dim));
  });
}

void norm_backward(const NormArgs& a) {
  const int64_t size = padded_size(a.dim);
  std::vector<float> weight(size), sums(size * a.num_threads);
  std::copy(a.weight, a.weight + a.dim, weight.begin());
  // Parts of fixed rows, so that the sum over them is the same in every run.
  const int64_t part = (a.rows + a.num_threads - 1) / a.num_threads;
  for_each_task(a.num_threads, a.num_threads, 3 * size, [&](int64_t task, float* p) {
    Row x(p, a.dim), gate(p + size, a.dim), grad(p + 2 * size, a.dim);
    Row grad_weight(&sums[task * size], a.dim);
    const int64_t end = std::min(a.rows, (task + 1) * part);
    for (int64_t r = task * part; r < end; r++)
      norm_backward_row(a, r, x, gate, grad, Row(weight.data(), a.dim), grad_weight);
  });
  for (int64_t i = 0; i < a.dim; i++) {
    float total = 0;
    for (int t = 0; t < a.num_threads; t++) total += sums[t * size + i];
    a.grad_weight[i] = total;
  }
}

void swiglu_forward(const SwigluArgs& a) {
  const int64_t size = padded_size(a.width);
  for_each_row(a.rows, a.num_threads, 2 * size, [&](int64_t r, float* p) {
    Row gate(p, a.width), up(p + size, a.width);
    gate.read(a.hidden, r, 0), up.read(a.hidden, r, a.width);
    for (int64_t i = 0; i < a.width; i += W) gate.set(i, silu(gate[i]) * up[i]);
    gate.write(a.activated, r);
  });
}

// silu' = s + silu (1 - s); the activations are formed again, for the gradient of the weight.
void swiglu_backward(const SwigluArgs& a) {
  const int64_t size = padded_size(a.width);
  for_each_row(a.rows, a.num_threads, 3 * size, [&](int64_t r, float* p) {
    Row gate(p, a.width), up(p + size, a.width), grad(p + 2 * size, a.width);
    gate.read(a.hidden, r, 0), up.read(a.hidden, r, a.width), grad.read(a.grad_activated, r);
    vf dot = {};
    for (int64_t i = 0; i < a.width; i += W) {
      const vf s = sigmoid(gate[i]), silu = gate[i] * s, activated = silu * up[i];
      dot += activated * grad[i];
      gate.set(i, grad[i] * up[i] * (s + silu * (1.0f - s)));
      up.set(i, activated);
      grad.set(i, grad[i] * silu);
    }
    gate.write(a.grad_hidden, r, 0), grad.write(a.grad_hidden, r, a.width);
    up.write(a.activated, r);
    if (a.dots) a.dots[r] = sum(dot);
  });
}

}  // namespace linnet

extern "C" void linnet_norm(const linnet::NormArgs* a) { linnet::norm_forward(*a); }
extern "C" void linnet_norm_backward(const linnet::NormArgs* a) { linnet::norm_backward(*a); }
extern "C" void linnet_swiglu(const linnet::SwigluArgs* a) { linnet::swiglu_forward(*a); }
extern "C" void linnet_swiglu_backward(const linnet::SwigluArgs* a) {
  linnet::swiglu_backward(*a);
}
