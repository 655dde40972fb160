// The small matrices of channel attention, d x d per sample and head: in double, whatever the tensors are stored in.
#pragma once

#include "common/cpu/vec.h"

namespace mirage::cpu::MIRAGE_ISA {

constexpr double kNormEps = 1e-12;  // of torch.nn.functional.normalize

inline double inverse_norm(double norm) { return 1.0 / (norm < kNormEps ? kNormEps : norm); }

// attn = softmax(t * gram_ij / (max(|q_i|, eps) max(|k_j|, eps))) over j. NaN and infinity pass through.
template <class A>
inline void softmax_of_gram(const double* gram, const double* q_norm, const double* k_norm, double t, int64_t d,
                            double* row, A* attn) {
  for (int64_t i = 0; i < d; ++i) {
    const double scale = t * inverse_norm(q_norm[i]);
    double most = -__builtin_inf(), total = 0;
    for (int64_t j = 0; j < d; ++j) {
      row[j] = scale * gram[i * d + j] * inverse_norm(k_norm[j]);
      if (row[j] > most) most = row[j];
    }
    for (int64_t j = 0; j < d; ++j) total += row[j] = __builtin_exp(row[j] - most);
    for (int64_t j = 0; j < d; ++j) attn[i * d + j] = A(row[j] / total);
  }
}

// Softmax backward. Computes from the gradient of attn what the pass over q and k needs:
//   grad_q_i = sum_j grad_gram_ij k_j + q_scale_i q_i,  grad_k_j = sum_i grad_gram_ij q_i + k_scale_j k_j
// norms: |q|, then |k|, d each; scales: q_scale, then k_scale. Returns the gradient of the temperature.
template <class A>
inline double softmax_of_gram_backward(const double* grad_attn, const A* gram, const A* norms, const A* attn,
                                       double t, int64_t d, double* sums, A* grad_gram, A* scales) {
  double grad_t = 0;
  for (int64_t i = 0; i < 2 * d; ++i) sums[i] = 0;
  for (int64_t i = 0; i < d; ++i) {
    const double iq = inverse_norm(norms[i]);
    double dot = 0;
    for (int64_t j = 0; j < d; ++j) dot += grad_attn[i * d + j] * attn[i * d + j];
    for (int64_t j = 0; j < d; ++j) {
      const double grad_s = attn[i * d + j] * (grad_attn[i * d + j] - dot);
      const double both = iq * inverse_norm(norms[d + j]), g = gram[i * d + j];
      grad_t += grad_s * g * both;
      const A rounded = A(t * grad_s * both);
      const double grad_g = rounded;  // what it is multiplied by: both parts of a gradient may cancel
      grad_gram[i * d + j] = rounded;
      sums[i] += grad_g * g;
      sums[d + j] += grad_g * g;
    }
  }
  for (int64_t i = 0; i < 2 * d; ++i) {
    const double inverse = inverse_norm(norms[i]);
    // F.normalize divides by eps if the norm is below it, so the norm then has no gradient.
    scales[i] = norms[i] < kNormEps ? A(0) : A(-inverse * inverse * sums[i]);
  }
  return grad_t;
}

}  // namespace mirage::cpu::MIRAGE_ISA
