// The Python arguments of every op: the members of its struct, in order.
#pragma once

#include "bind.h"

namespace fastlm {

#define FIELD(member) \
  Field<Op> { #member, [](Op& op, const py::handle& value) { op.member = from_python<decltype(op.member)>(value); } }

template <>
inline std::vector<Field<SoftmaxXentFwd>> fields_of() {
  using Op = SoftmaxXentFwd;
  return {
      FIELD(loss), FIELD(lse), FIELD(x), FIELD(stride_xn), FIELD(y), FIELD(N), FIELD(V), FIELD(ignore),
      FIELD(dtype)
  };
}

template <>
inline std::vector<Field<SoftmaxXentBwd>> fields_of() {
  using Op = SoftmaxXentBwd;
  return {
      FIELD(dx), FIELD(stride_dxn), FIELD(dloss), FIELD(x), FIELD(stride_xn), FIELD(y), FIELD(lse),
      FIELD(N), FIELD(V), FIELD(ignore), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<SoftmaxXentBoth>> fields_of() {
  using Op = SoftmaxXentBoth;
  return {
      FIELD(loss), FIELD(lse), FIELD(x), FIELD(stride_xn), FIELD(dloss), FIELD(y), FIELD(N), FIELD(V),
      FIELD(ignore), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<Gpt2BlocksFwd>> fields_of() {
  using Op = Gpt2BlocksFwd;
  return {
      FIELD(y), FIELD(between), FIELD(h1), FIELD(qkv), FIELD(o), FIELD(lse), FIELD(s), FIELD(h2), FIELD(slope),
      FIELD(g), FIELD(statistics), FIELD(x), FIELD(weights), FIELD(L), FIELD(B), FIELD(T), FIELD(H),
      FIELD(D), FIELD(F), FIELD(epsilon)
  };
}

template <>
inline std::vector<Field<Gpt2BlocksBwd>> fields_of() {
  using Op = Gpt2BlocksBwd;
  return {
      FIELD(dx), FIELD(gradients), FIELD(scratch), FIELD(dy), FIELD(x), FIELD(between), FIELD(h1),
      FIELD(qkv), FIELD(o), FIELD(lse), FIELD(s), FIELD(h2), FIELD(slope), FIELD(g), FIELD(statistics),
      FIELD(weights), FIELD(L), FIELD(B), FIELD(T), FIELD(H), FIELD(D), FIELD(F)
  };
}

template <>
inline std::vector<Field<BiasGeluFwd>> fields_of() {
  using Op = BiasGeluFwd;
  return {
      FIELD(y), FIELD(x), FIELD(stride_xn), FIELD(bias), FIELD(N), FIELD(C), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<BiasGeluBwd>> fields_of() {
  using Op = BiasGeluBwd;
  return {
      FIELD(dx), FIELD(dbias), FIELD(scratch), FIELD(dy), FIELD(stride_dyn), FIELD(x), FIELD(stride_xn),
      FIELD(bias), FIELD(N), FIELD(C), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<LayerNormFwd>> fields_of() {
  using Op = LayerNormFwd;
  return {
      FIELD(y), FIELD(s), FIELD(mean), FIELD(rstd), FIELD(x), FIELD(stride_xn), FIELD(residual),
      FIELD(stride_rn), FIELD(weight), FIELD(bias), FIELD(N), FIELD(C), FIELD(epsilon), FIELD(dtype),
      FIELD(s_dtype), FIELD(y_dtype)
  };
}

template <>
inline std::vector<Field<LayerNormBwd>> fields_of() {
  using Op = LayerNormBwd;
  return {
      FIELD(dx), FIELD(dresidual), FIELD(dweight_dbias), FIELD(scratch), FIELD(dy), FIELD(stride_dyn),
      FIELD(ds), FIELD(stride_dsn), FIELD(s), FIELD(stride_sn), FIELD(weight), FIELD(mean), FIELD(rstd),
      FIELD(N), FIELD(C), FIELD(dtype), FIELD(s_dtype), FIELD(y_dtype)
  };
}

template <>
inline std::vector<Field<Adamw>> fields_of() {
  using Op = Adamw;
  return {
      FIELD(p), FIELD(g), FIELD(exp_avg), FIELD(exp_avg_sq), FIELD(scale), FIELD(n), FIELD(learning_rate),
      FIELD(one_minus_beta1), FIELD(beta2), FIELD(one_minus_beta2), FIELD(epsilon), FIELD(weight_decay),
      FIELD(bias_correction1), FIELD(bias_correction2)
  };
}

template <>
inline std::vector<Field<GradNorm>> fields_of() {
  using Op = GradNorm;
  return {
      FIELD(norm), FIELD(scratch), FIELD(g), FIELD(n)
  };
}

template <>
inline std::vector<Field<AttentionFwd>> fields_of() {
  using Op = AttentionFwd;
  return {
      FIELD(o), FIELD(stride_ob), FIELD(stride_ot), FIELD(stride_oh), FIELD(lse), FIELD(q),
      FIELD(stride_qb), FIELD(stride_qt), FIELD(stride_qh), FIELD(k), FIELD(stride_kb), FIELD(stride_ks),
      FIELD(stride_kh), FIELD(v), FIELD(stride_vb), FIELD(stride_vs), FIELD(stride_vh), FIELD(seed),
      FIELD(B), FIELD(T), FIELD(S), FIELD(H), FIELD(D), FIELD(causal), FIELD(scale), FIELD(drop),
      FIELD(dtype)
  };
}

template <>
inline std::vector<Field<AttentionBwd>> fields_of() {
  using Op = AttentionBwd;
  return {
      FIELD(dq), FIELD(stride_dqb), FIELD(stride_dqt), FIELD(stride_dqh), FIELD(dk), FIELD(stride_dkb),
      FIELD(stride_dks), FIELD(stride_dkh), FIELD(dv), FIELD(stride_dvb), FIELD(stride_dvs),
      FIELD(stride_dvh), FIELD(delta), FIELD(do_), FIELD(stride_dob), FIELD(stride_dot),
      FIELD(stride_doh), FIELD(q), FIELD(stride_qb), FIELD(stride_qt), FIELD(stride_qh), FIELD(k),
      FIELD(stride_kb), FIELD(stride_ks), FIELD(stride_kh), FIELD(v), FIELD(stride_vb), FIELD(stride_vs),
      FIELD(stride_vh), FIELD(o), FIELD(stride_ob), FIELD(stride_ot), FIELD(stride_oh), FIELD(lse),
      FIELD(seed), FIELD(B), FIELD(T), FIELD(S), FIELD(H), FIELD(D), FIELD(causal), FIELD(scale),
      FIELD(drop), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<DecodeAttention>> fields_of() {
  using Op = DecodeAttention;
  return {
      FIELD(o), FIELD(scratch), FIELD(q), FIELD(stride_qb), FIELD(stride_qt), FIELD(stride_qh), FIELD(k_pages),
      FIELD(stride_kp), FIELD(stride_ks), FIELD(stride_kh), FIELD(v_pages), FIELD(stride_vp),
      FIELD(stride_vs), FIELD(stride_vh), FIELD(block_table), FIELD(stride_tb), FIELD(lengths), FIELD(B),
      FIELD(T), FIELD(H), FIELD(D), FIELD(page), FIELD(max_pages), FIELD(scale), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<CacheAppend>> fields_of() {
  using Op = CacheAppend;
  return {
      FIELD(k_pages), FIELD(stride_kpp), FIELD(stride_kps), FIELD(stride_kph), FIELD(v_pages),
      FIELD(stride_vpp), FIELD(stride_vps), FIELD(stride_vph), FIELD(k), FIELD(stride_kb),
      FIELD(stride_kt), FIELD(stride_kh), FIELD(v), FIELD(stride_vb), FIELD(stride_vt), FIELD(stride_vh),
      FIELD(block_table), FIELD(stride_tb), FIELD(positions), FIELD(stride_pb), FIELD(B), FIELD(T),
      FIELD(H), FIELD(D), FIELD(page), FIELD(max_pages), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<Gpt2Step>> fields_of() {
  using Op = Gpt2Step;
  return {
      FIELD(logits), FIELD(ids), FIELD(layers), FIELD(head), FIELD(head_scale), FIELD(head_sums), FIELD(ln_f_w), FIELD(ln_f_b),
      FIELD(wte), FIELD(wpe), FIELD(tokens), FIELD(positions), FIELD(counts), FIELD(block_table), FIELD(uniform),
      FIELD(step), FIELD(stride_u), FIELD(choices), FIELD(top_k), FIELD(temperature), FIELD(top_p), FIELD(stride_p), FIELD(stride_s), FIELD(stride_h), FIELD(B), FIELD(T), FIELD(L), FIELD(H), FIELD(D),
      FIELD(V), FIELD(inner), FIELD(page), FIELD(max_pages), FIELD(every),
      FIELD(epsilon), FIELD(weights), FIELD(head_weights), FIELD(page_dtype), FIELD(dtype)
  };
}

template <>
inline std::vector<Field<Draw>> fields_of() {
  using Op = Draw;
  return {
      FIELD(ids), FIELD(logits), FIELD(uniform), FIELD(stride_lb), FIELD(stride_u), FIELD(B), FIELD(choices),
      FIELD(temperature), FIELD(top_k), FIELD(top_p)
  };
}

#undef FIELD

}  // namespace fastlm
